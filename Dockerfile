# Image for stages, flows and Prefect workers. docs/docker.md describes how to build it, with or without an engine.
ARG BASE=python:3.11-slim

FROM ${BASE} AS packages
# cuda: requirements.lock as it is, every file checked by its hash; runs without a GPU, too. cpu: a smaller torch.
ARG TORCH=cuda
WORKDIR /build
COPY requirements.lock .
# pip.conf, uv.toml and certificates may be passed as secrets of the build; none of them stays in the image.
# uv is installed first, from its own lines of the lock. With TORCH=cpu, torch and torchvision have the locked versions
# but other files than those in the lock, so these two are not checked by a hash; all other packages are.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=cache,target=/root/.cache/uv \
    set -eu; \
    export SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt; \
    export UV_LINK_MODE=copy VIRTUAL_ENV=/opt/venv; \
    case "$TORCH" in \
      cuda) other='' ;; \
      cpu) other='^(torch|torchvision|triton|nvidia-[^=]+|cuda-[^=]+)==' ;; \
      *) echo "TORCH is $TORCH; it can be cuda or cpu" >&2; exit 1 ;; \
    esac; \
    awk '/^[a-z0-9]/ { keep = /^uv==/ } keep' requirements.lock > uv.lock; \
    awk -v other="$other" '/^[a-z0-9]/ { keep = other == "" || $0 !~ other } keep' requirements.lock > most.lock; \
    python3 -m venv /opt/uv; \
    /opt/uv/bin/pip install --quiet --disable-pip-version-check --no-cache-dir --require-hashes --requirement uv.lock; \
    python3 -m venv --without-pip /opt/venv; \
    /opt/uv/bin/uv pip sync --require-hashes --compile-bytecode most.lock; \
    if [ "$TORCH" = cpu ]; then \
      awk '/^(torch|torchvision)==/ { print $1 }' requirements.lock > torch.txt; \
      /opt/uv/bin/uv pip install --no-deps --torch-backend=cpu --compile-bytecode --requirement torch.txt; \
    fi; \
    /opt/venv/bin/python -c 'import pathlib, sysconfig; \
pathlib.Path(sysconfig.get_path("purelib"), "espalier.pth").write_text("/app\n")'; \
    printf '%s\n' '#!/opt/venv/bin/python' 'from flows.__main__ import main' 'main()' > /opt/venv/bin/espalier; \
    chmod +x /opt/venv/bin/espalier

FROM ${BASE}
# git, because every run works in a clone. A checkout, or its .git alone, can be mounted at /repository, with any
# owner.
# hadolint ignore=DL3008 # the base decides the release of Debian, whose servers soon drop a pinned version of git
RUN command -v git >/dev/null \
    || { apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*; }; \
    useradd --uid 1000 --home-dir /var/lib/espalier --shell /usr/sbin/nologin --no-log-init espalier \
    && install --directory --owner=espalier --group=espalier /var/lib/espalier \
    && git config --system --add safe.directory /repository \
    && git config --system --add safe.directory /repository/.git
COPY --from=packages /opt/venv /opt/venv
COPY . /app
# HOME, ESPALIER_HOME and everything else that a worker keeps are in one volume; so is the record unless an MLflow server
# is set, because /repository is read-only. Telemetry is off, as in stages/runtime/telemetry.py.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/espalier \
    ESPALIER_HOME=/var/lib/espalier \
    ESPALIER_REPOSITORY=/repository \
    MLFLOW_TRACKING_URI=sqlite:////var/lib/espalier/mlflow.db \
    DO_NOT_TRACK=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    HF_UPDATE_DOWNLOAD_COUNTS=0 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_SERVER_UI_V2_ENABLED=false \
    PREFECT_WORKER_WEBSERVER_HOST=127.0.0.1
VOLUME /var/lib/espalier
WORKDIR /app
USER 1000:1000
# The worker reports unhealthy if it has not polled its server for a while. For other commands: --no-healthcheck.
HEALTHCHECK --interval=30s --timeout=10s --start-period=90s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health', timeout=8)"]
# The docker pool passes a variable that its worker lacks as an empty one, which would replace a default above.
ENTRYPOINT ["sh", "-c", ": \"${ESPALIER_REPOSITORY:=/repository}\" \
\"${MLFLOW_TRACKING_URI:=sqlite:////var/lib/espalier/mlflow.db}\"; \
export ESPALIER_REPOSITORY MLFLOW_TRACKING_URI; exec \"$@\"", "espalier"]
# Without an address Prefect would start a server of its own and wait there for runs that cannot arrive.
CMD ["sh", "-c", ": \"${PREFECT_API_URL:?name the Prefect server to work for}\"; \
exec prefect worker start --type process --pool \"${ESPALIER_POOL:-espalier}\" \
--base-job-template flows/pools/process.json --with-healthcheck"]
