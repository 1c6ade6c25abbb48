# docker build -t hf-objectives . && docker run --rm hf-objectives
# For a GPU: --build-arg BASE=pytorch/pytorch:2.13.0-cuda12.8-cudnn9-runtime; the first install then finds torch and does nothing.
ARG BASE=python:3.11.15-slim-bookworm
FROM ${BASE}
RUN useradd --create-home --uid 1000 trainer
WORKDIR /home/trainer/app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY hf_objectives hf_objectives
RUN pip install --no-cache-dir torch -c constraints.txt \
    && pip install --no-cache-dir '.[trackio]' -c constraints.txt
USER 1000
WORKDIR /home/trainer
CMD ["hf-objectives", "sft", "--config", "quickstart"]
