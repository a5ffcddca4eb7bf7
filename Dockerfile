# docker build -t pinrec .
# chown 10001 /srv/histories /srv/keys      # a folder that the server writes, a file of API keys that it reads
# docker run -p 8000:8000 -v /srv/releases:/releases:ro -v /srv/histories:/histories -v /srv/keys:/run/secrets/keys:ro pinrec
FROM python:3.11-slim-bookworm AS build
ARG TORCH=torch==2.13.0
# the build of torch without CUDA: a gigabyte or two less; other wheels come from PyPI
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" "$TORCH"
WORKDIR /source
COPY . .
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[redis]"

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --no-create-home pinrec && mkdir /histories && chown pinrec /histories
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH HF_HUB_OFFLINE=1 HF_HOME=/tmp/huggingface OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz')"]
# /releases/current is a symbolic link: point it elsewhere and send SIGHUP to swap or roll back
ENTRYPOINT ["pinrec", "serve", "--host", "0.0.0.0"]
CMD ["--model", "/releases/current", "--histories", "/histories/events.sqlite", "--api-key-file", "/run/secrets/keys"]
