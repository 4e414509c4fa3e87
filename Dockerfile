# The daemon and kvctl, without torch. docs/container.md says how to run it.
#
#   docker build -t kvservice .
#
# The base is pinned by version and digest. Another one: --build-arg PYTHON_IMAGE=python:...@sha256:...
# What a tag stands for today: docker buildx imagetools inspect python:3.13.14-slim-trixie
ARG PYTHON_IMAGE=python:3.13.14-slim-trixie@sha256:6771159cd4fa5d9bba1258caf0b82e6b73458c694d178ad97c5e925c2d0e1a91

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# For the C extension that copies and sums. A base with Debian's Python also needs libpython3-dev.
ARG BUILD_PACKAGES="gcc libc6-dev"
# Not pinned: Debian keeps the newest versions only, and nothing of them is in the image.
# hadolint ignore=DL3008
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends ${BUILD_PACKAGES}
WORKDIR /src
COPY constraints.txt hatch_build.py pyproject.toml README.md LICENSE ./
COPY kvservice kvservice
COPY proto proto
COPY client client
COPY engine_adapter engine_adapter
# With --secret id=pip,src=pip.conf, pip uses the mirror of that file. It does not get into the image.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf python -m pip install -c constraints.txt hatchling \
    && python -m pip wheel --no-build-isolation -c constraints.txt -w /wheels '.[cli,daemon,otel]'
RUN python -m venv --without-pip /opt/kvservice \
    && python -m pip --python /opt/kvservice/bin/python install --no-index -f /wheels 'kvservice[cli,daemon,otel]'

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/kvservice /opt/kvservice
# They belong to the user below, and so does a named volume that is mounted there for the first time.
RUN install -d -m 0750 -o 10001 -g 10001 /var/lib/kvservice /run/kvservice
# The store is a disk. The arena is memory: mount a tmpfs there, or the daemon warns. The socket lies beside the
# arena: a container that mounts that volume has all that a client on the same host needs.
ENV PATH=/opt/kvservice/bin:$PATH \
    KVSERVICE_STORE__PATH=/var/lib/kvservice \
    KVSERVICE_DRAM__PATH=/run/kvservice \
    KVSERVICE_SERVER__UNIX_SOCKET=/run/kvservice/kvservice.sock \
    KVCTL_ADDRESS=/run/kvservice/kvservice.sock
VOLUME ["/var/lib/kvservice", "/run/kvservice"]
EXPOSE 7070 7071 9464
USER 10001:10001
WORKDIR /var/lib/kvservice
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["kvctl", "health", "--timeout", "3"]
ENTRYPOINT ["kvservice"]
CMD ["serve"]
