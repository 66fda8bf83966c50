# The image of every role and of every job: `docker build -t seamark .`
#
# A release names its base by the digest: --build-arg PYTHON=python:3.13-slim-bookworm@sha256:…
ARG PYTHON=python:3.13-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
# What is installed is pinned by its hash. Nothing is compiled: a package without a wheel fails here.
COPY requirements.txt requirements-build.txt ./
RUN python -m venv --without-pip /opt/seamark \
    && python -m pip --python /opt/seamark/bin/python install --quiet --only-binary :all: --require-hashes -r requirements.txt
RUN python -m venv --without-pip /opt/build \
    && python -m pip --python /opt/build/bin/python install --quiet --only-binary :all: --require-hashes -r requirements-build.txt
COPY . .
RUN cd seamark && /opt/build/bin/python -m hatchling build -t wheel -d /opt/wheels \
    && cd .. && /opt/build/bin/python -m hatchling build -t wheel -d /opt/wheels \
    && python -m pip --python /opt/seamark/bin/python install --quiet --no-deps --no-index /opt/wheels/*.whl

FROM ${PYTHON}
# Nothing is installed in a container that runs, so nothing that installs is in it.
RUN python -m pip uninstall --quiet --yes pip
COPY --from=build /opt/seamark /opt/seamark
# The root file system may be read only: modules are compiled already, and no role writes a file.
ENV PATH=/opt/seamark/bin:/usr/local/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 SEAMARK_HEALTH_PORT=9090
USER 65532:65532
WORKDIR /tmp
EXPOSE 8080 9090
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=6 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"SEAMARK_HEALTH_PORT\"]}/healthz', timeout=4)"]
ENTRYPOINT ["seamark"]
