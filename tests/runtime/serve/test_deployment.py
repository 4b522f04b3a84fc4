"""python -m pytest tests/runtime/serve/test_deployment.py

What other servers are given: the repository for OpenVINO Model Server, the container and the objects of Kubernetes. None of them
runs here; their files are read as their readers read them, and every command line in them is one that our parser takes.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

pytest.importorskip("google.protobuf", reason="protobuf is not installed: pip install 'internvl-openvino[convert]'")
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory, text_format

from convert import ConvertOptions, convert
from convert.__main__ import main
from convert.serving import GRAPH, add_to_repository
from runtime.__main__ import parser
from runtime.errors import ModelFolderError, OptionError

ROOT = Path(__file__).parents[3]
SERVING = ROOT / "demo" / "serving"


# ---- OpenVINO Model Server


@pytest.fixture(scope="module")
def repository(tmp_path_factory, tiny):
    """Two models, one after the other."""
    folder = tmp_path_factory.mktemp("repository") / "models"
    for name in ("tiny-qwen2", "tiny-internlm2"):
        convert(str(tiny(name)), folder, ConvertOptions(weight_format="int8", verify=False, serving="ovms"))
    return folder


def graph_type():
    """mediapipe.CalculatorGraphConfig as far as the graph goes; names and numbers of google/mediapipe and
    openvinotoolkit/model_server@7e4df0c7 src/llm/llm_calculator.proto."""
    text, message, boolean, number, enum = 9, 11, 8, 4, 14
    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="mediapipe", syntax="proto2")
    file.dependency.append("google/protobuf/any.proto")

    def add(name: str, *fields: tuple, ranges: tuple[int, int] | None = None, extension: tuple[str, int] | None = None):
        made = file.message_type.add(name=name)
        for field_name, place, kind, repeated, of in fields:
            made.field.add(name=field_name, number=place, type=kind, label=3 if repeated else 1, type_name=of or None)
        if ranges:
            made.extension_range.add(start=ranges[0], end=ranges[1])
        if extension:
            made.extension.add(
                name="ext", number=extension[1], type=message, label=1, extendee=extension[0], type_name=f".mediapipe.{name}"
            )
        return made

    add("InputStreamInfo", ("tag_index", 1, text, False, ""), ("back_edge", 2, boolean, False, ""))
    add("MediaPipeOptions", ranges=(20000, 536870912))
    add("SyncSet", ("tag_index", 1, text, True, ""))
    add(
        "SyncSetInputStreamHandlerOptions",
        ("sync_set", 1, message, True, ".mediapipe.SyncSet"),
        extension=(".mediapipe.MediaPipeOptions", 100258895),
    )
    add(
        "InputStreamHandlerConfig",
        ("input_stream_handler", 1, text, False, ""),
        ("options", 3, message, False, ".mediapipe.MediaPipeOptions"),
    )
    add(
        "Node",
        ("name", 1, text, False, ""),
        ("calculator", 2, text, False, ""),
        ("input_stream", 3, text, True, ""),
        ("output_stream", 4, text, True, ""),
        ("input_side_packet", 5, text, True, ""),
        ("node_options", 8, message, True, ".google.protobuf.Any"),
        ("input_stream_handler", 11, message, False, ".mediapipe.InputStreamHandlerConfig"),
        ("input_stream_info", 13, message, True, ".mediapipe.InputStreamInfo"),
    )
    add(
        "CalculatorGraphConfig",
        ("node", 1, message, True, ".mediapipe.Node"),
        ("input_stream", 10, text, True, ""),
        ("output_stream", 15, text, True, ""),
    )
    options = add(
        "LLMCalculatorOptions",
        ("models_path", 1, text, False, ""),
        ("max_num_batched_tokens", 2, number, False, ""),
        ("cache_size", 3, number, False, ""),
        ("device", 6, text, False, ""),
        ("plugin_config", 7, text, False, ""),
        ("pipeline_type", 19, enum, False, ".mediapipe.LLMCalculatorOptions.PipelineType"),
    )
    kinds = options.enum_type.add(name="PipelineType")
    for place, name in enumerate(("LM", "VLM", "LM_CB", "VLM_CB", "OMNI", "AUTO")):
        kinds.value.add(name=name, number=place)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return pool, lambda name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"mediapipe.{name}"))


def test_the_graph_is_one_that_the_model_server_reads(repository):
    pool, kind = graph_type()
    graph = text_format.Parse(
        (repository / "tiny-qwen2-int8" / "graph.pbtxt").read_text(), kind("CalculatorGraphConfig")(), descriptor_pool=pool
    )
    (node,) = graph.node
    assert node.calculator == "HttpLLMCalculator"
    assert [*node.input_stream] == ["LOOPBACK:loopback", "HTTP_REQUEST_PAYLOAD:input"]
    assert [*node.input_side_packet] == ["LLM_NODE_RESOURCES:llm", "LLM_NODE_EXECUTION_CONTEXTS:llm_ctx"]
    assert node.input_stream_info[0].back_edge
    options = kind("LLMCalculatorOptions")()
    assert node.node_options[0].Unpack(options)
    assert (options.models_path, options.pipeline_type, options.device) == ("./", 3, "CPU")
    with pytest.raises(text_format.ParseError):
        text_format.Parse(GRAPH.replace("cache_size", "cash_size"), kind("CalculatorGraphConfig")(), descriptor_pool=pool)


def test_the_repository_lists_its_models_by_folder(repository):
    listed = json.loads((repository / "config.json").read_text())
    assert listed == {
        "model_config_list": [
            {"config": {"name": "tiny-qwen2-int8", "base_path": "tiny-qwen2-int8"}},
            {"config": {"name": "tiny-internlm2-int8", "base_path": "tiny-internlm2-int8"}},
        ]
    }
    for model in listed["model_config_list"]:
        folder = repository / model["config"]["base_path"]
        assert (folder / "graph.pbtxt").exists()
        assert not (folder / "openvino_model.xml").exists(), "the server would take it for the whole model"
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["InternVLChatModel"], (
            "its task is found by this"
        )


def test_a_folder_in_a_repository_is_a_model_folder(repository):
    genai = pytest.importorskip("openvino_genai")
    assert genai.VLMPipeline(str(repository / "tiny-internlm2-int8"), "CPU").generate("Hi", max_new_tokens=2)


def test_a_model_that_is_converted_again_is_listed_once(tmp_path):
    for _ in range(2):
        add_to_repository(tmp_path, "a")
    add_to_repository(tmp_path, "b")
    assert [model["config"]["name"] for model in json.loads((tmp_path / "config.json").read_text())["model_config_list"]] == [
        "a",
        "b",
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "internvl_chat"}', '{"model_config_list": [5]}'])
def test_another_config_is_not_overwritten(tmp_path, tiny, capsys, text):
    (tmp_path / "config.json").write_text(text)
    assert main([str(tiny("tiny-qwen2")), str(tmp_path), "--serving", "ovms"]) == ModelFolderError.exit_code
    assert "is not OpenVINO Model Server's list of models" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == text
    assert [*tmp_path.iterdir()] == [tmp_path / "config.json"]


def test_visual_experts_are_refused(tmp_path, tiny):
    with pytest.raises(OptionError, match="cannot run visual experts"):
        convert(str(tiny("tiny-mono")), tmp_path / "models", ConvertOptions(serving="ovms"))
    assert not (tmp_path / "models").exists()


# ---- containers


def takes(command: list[str]) -> dict:
    """The options of a server's command line; argparse exits where it is wrong."""
    return vars(parser().parse_args(["serve", *command]))


def test_the_containers_command_is_ours():
    text = (SERVING / "Dockerfile").read_text()
    assert json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.M).group(1)) == ["python", "-m", "runtime", "serve"]
    options = takes(json.loads(re.search(r"^CMD (.*)$", text, re.M).group(1)))
    assert (options["host"], options["port"]) == ("0.0.0.0", int(re.search(r"^EXPOSE (\d+)$", text, re.M).group(1)))
    shown = re.search(r"/model --host 0.0.0.0 --device GPU --cache-dir /cache", text).group()
    assert takes(shlex.split(shown))["device"] == "GPU"


def test_the_context_has_what_the_installation_reads():
    kept = {line[1:] for line in (SERVING / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"} == kept


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_services_commands_are_ours(name):
    compose = yaml.safe_load((SERVING / "compose.yaml").read_text())
    service = compose["services"][name]
    options = takes(service["command"])
    assert options["device"] == name.upper()
    assert service["ports"] == [f"127.0.0.1:{options['port']}:{options['port']}"]
    assert (SERVING / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == SERVING / "Dockerfile"
    assert service["volumes"][0].endswith(f":{options['folder']}:ro")
    assert ("devices" in service) == (name == "gpu")
    assert "INTERNVL_API_KEY" in service["environment"], "which the server reads"


def test_the_objects_of_kubernetes_belong_together():
    claim, deployment, service = yaml.safe_load_all((SERVING / "kubernetes.yaml").read_text())
    assert [each["kind"] for each in (claim, deployment, service)] == ["PersistentVolumeClaim", "Deployment", "Service"]
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["spec"]["selector"]
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"] == container["readinessProbe"]["httpGet"]["port"]
    assert container["args"] == ["--config_path", "/models/config.json", "--rest_port", str(port["containerPort"])]
    (mount,), (volume,) = container["volumeMounts"], pod["spec"]["volumes"]
    assert mount["name"] == volume["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_job_on_kuberay_is_one_of_ours():
    claim, job = yaml.safe_load_all((SERVING / "kuberay.yaml").read_text())
    assert (claim["kind"], claim["spec"]["accessModes"]) == ("PersistentVolumeClaim", ["ReadWriteMany"])
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert {*job["spec"]} == {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
    head, (workers,) = job["spec"]["rayClusterSpec"]["headGroupSpec"], job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert {*head} == {"rayStartParams", "template"}
    assert {*workers} == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert all(isinstance(value, str) for value in head["rayStartParams"].values()), "KubeRay takes texts alone"
    python, module, package, *command = shlex.split(job["spec"]["entrypoint"])
    assert (python, module, package) == ("python", "-m", "runtime")
    options = vars(parser().parse_args(command))
    assert (options["command"], options["ray"]) == ("batch", "auto")
    built = re.search(r"--build-arg PACKAGES=\"(.*)\" -t (\S+) \.", (SERVING / "kuberay.yaml").read_text())
    assert "/source[ray]" in built[1]
    for group in (head, workers):
        pod = group["template"]["spec"]
        (container,), (volume,) = pod["containers"], pod["volumes"]
        (mount,) = container["volumeMounts"]
        assert container["image"] == built[2]
        assert mount["name"] == volume["name"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert all(str(options[name]).startswith(mount["mountPath"] + "/") for name in ("folder", "requests", "answers"))
