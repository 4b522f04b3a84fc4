"""The files that OpenVINO Model Server needs: the graph in a model folder, and the repository's list of models.

Writes small text files and converts nothing. Their formats: openvinotoolkit/model_server@7e4df0c7 src/llm/llm_calculator.proto,
src/graph_export/graph_export.cpp, src/schema.cpp
"""

from __future__ import annotations

import json
from pathlib import Path

from runtime.errors import ModelFolderError

OVMS = "ovms"
DEFAULT_REPOSITORY = "models"
GRAPH_FILE, REPOSITORY_FILE = "graph.pbtxt", "config.json"
CACHE_GB = 2  # of the KV cache of all requests

# One node that calls itself for the next token, over the graph's own folder. VLM_CB: pictures, continuous batching.
GRAPH = f"""\
input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"

node: {{
  name: "LLMExecutor"
  calculator: "HttpLLMCalculator"
  input_stream: "LOOPBACK:loopback"
  input_stream: "HTTP_REQUEST_PAYLOAD:input"
  input_side_packet: "LLM_NODE_RESOURCES:llm"
  input_side_packet: "LLM_NODE_EXECUTION_CONTEXTS:llm_ctx"
  output_stream: "LOOPBACK:loopback"
  output_stream: "HTTP_RESPONSE_PAYLOAD:output"
  input_stream_info: {{
    tag_index: "LOOPBACK:0"
    back_edge: true
  }}
  node_options: {{
    [type.googleapis.com/mediapipe.LLMCalculatorOptions]: {{
      pipeline_type: VLM_CB
      models_path: "./"
      cache_size: {CACHE_GB}
      device: "CPU"
    }}
  }}
  input_stream_handler {{
    input_stream_handler: "SyncSetInputStreamHandler"
    options {{
      [mediapipe.SyncSetInputStreamHandlerOptions.ext] {{
        sync_set {{
          tag_index: "LOOPBACK:0"
        }}
      }}
    }}
  }}
}}
"""


def check_repository(repository: Path) -> None:
    """Raise ModelFolderError unless a model can be added there."""
    _models(repository)


def write_graph(folder: Path) -> None:
    """Put the graph into a model folder."""
    (folder / GRAPH_FILE).write_text(GRAPH, encoding="utf-8")


def add_to_repository(repository: Path, name: str) -> None:
    """Add the model folder `name` to the repository's list."""
    models = [model for model in _models(repository) if model["config"]["name"] != name]
    models.append({"config": {"name": name, "base_path": name}})
    text = json.dumps({"model_config_list": models}, indent=2) + "\n"
    (repository / REPOSITORY_FILE).write_text(text, encoding="utf-8")


def _models(repository: Path) -> list[dict]:
    """The models of a repository's list. Raises ModelFolderError if the file is something else."""
    file = repository / REPOSITORY_FILE
    if not file.exists():
        return []
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["model_config_list"]
        if all(model["config"]["name"] for model in listed):
            return listed
    except (ValueError, KeyError, TypeError):
        pass
    raise ModelFolderError(f"{file} is not OpenVINO Model Server's list of models: give another folder for the repository")
