# A CPU image of abliterate. The demo, with its report in ./out:
#
#   docker build -t abliterate .
#   docker run --rm -v "$PWD/out:/out" abliterate demo
#   docker run --rm -v "$PWD/out:/out" abliterate run Qwen/Qwen2.5-0.5B-Instruct -o /out/edited
FROM python:3.11-slim
ENV PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu PYTHONUNBUFFERED=1
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY scripts/demo_model.py scripts/demo.sh scripts/
RUN pip install '.[gguf,lora,search]' && useradd --create-home abliterate && mkdir /out && chown abliterate /out
USER abliterate
ENTRYPOINT ["/src/scripts/demo.sh"]
CMD ["--help"]
