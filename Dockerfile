# docker build -t hf-objectives . && docker run --rm hf-objectives
# For a GPU start from an image that has PyTorch for your driver; the first install then finds it and does nothing.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends make git && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE Makefile ./
COPY hf_objectives hf_objectives
COPY recipes recipes
RUN pip install --no-cache-dir torch -c constraints.txt \
    && pip install --no-cache-dir '.[trackio]' -c constraints.txt
CMD ["accelerate", "launch", "--num_processes", "1", "recipes/sft.py", "--config", "quickstart"]
