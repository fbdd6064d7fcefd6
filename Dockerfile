# edge-compress for the x86 and phone targets, on the CPU.
#   docker build -t edge-compress .
#   docker run --rm -v "$PWD:/work" edge-compress --target x86 --out runs/demo
FROM python:3.12-slim

# no root in the container; what it writes below /work belongs to this user
RUN useradd --create-home --uid 1000 user && mkdir /work && chown user /work
WORKDIR /opt/edge-compress
COPY pyproject.toml constraints.txt README.md LICENSE __init__.py __main__.py py.typed ./
COPY pipeline pipeline
COPY targets targets
COPY calibration calibration
COPY devices devices
# Docker's cache keeps the layer; PIP_INDEX_URL and PIP_EXTRA_INDEX_URL choose where PyTorch's CPU build comes from
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir -c constraints.txt '.[phone,release]'

USER user
WORKDIR /work
ENV OMP_WAIT_POLICY=PASSIVE
ENTRYPOINT ["edge-compress"]
CMD ["--help"]
