"""A finished compression -> a version in MLflow's registry, promoted through a gate, and proved by running it again."""
