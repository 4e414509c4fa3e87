# vLLM's image with the connector, for ops/compose and ops/kubernetes. From the repository's root:
#
#   docker build -f ops/compose/vllm.Dockerfile -t vllm-with-kvservice .
#
# Another vLLM: --build-arg VLLM_IMAGE=vllm/vllm-openai:...
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${VLLM_IMAGE} AS build
COPY . /src
RUN python3 -m pip wheel --no-cache-dir --no-deps -w /wheels /src

FROM ${VLLM_IMAGE}
COPY --from=build /wheels /tmp/wheels
# pip installs what vLLM's image lacks, and leaves the packages that it has and that the client's bounds allow.
RUN python3 -m pip install --no-cache-dir /tmp/wheels/kvservice-*.whl \
    && rm -r /tmp/wheels
