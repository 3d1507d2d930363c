"""References of tests, written at once and not as they come."""

from stages.protocol.reference import reference_files, write_about


def write_reference(folder, reference):
    """Write the files that the stage writes."""
    folder.mkdir(parents=True, exist_ok=True)
    samples, real = reference.samples, reference.real_features
    files = reference_files(folder, reference.protocol, samples.shape[2:], real.shape[1])
    for file in files.row_files():
        file.create()
    files.samples.write(0, samples)
    files.features.write(0, reference.features.numpy())
    files.real_features.write(0, real.numpy())
    write_about(folder, reference.protocol, reference.model_sha256, reference.table)
