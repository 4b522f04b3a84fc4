"""python -m pytest tests/runtime/serve/test_offline.py

`from runtime import pipeline`: prompts of every form that LMDeploy's pipeline takes are answered as a conversation answers them,
alone, in lists, streamed and turn by turn, by both engines.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("pydantic", reason="pydantic is not installed: pip install 'internvl-openvino[serve]'")
pytest.importorskip("openvino_genai", reason="openvino_genai is not installed")

from runtime import GenerationConfig, OVInternVLChatModel, pipeline
from runtime.errors import ModelFolderError, OptionError, PictureError, PromptError
from runtime.serve import offline

ROOT = Path(__file__).parents[3]
PICTURE = ROOT / "demo" / "examples" / "shapes.png"
QUESTIONS = ["Describe the picture.", "Which shape is purple?", "How many shapes are there?", "What colour is the star?"]


@pytest.fixture(scope="module")
def model(shapes):
    return OVInternVLChatModel(shapes)


@pytest.fixture(scope="module", params=["genai", "native"])
def pipe(request, shapes):
    with pipeline(shapes, engine=request.param, cache_size=1) as made:
        yield made


@pytest.fixture(scope="module")
def wanted(model):
    return {text: model.start_conversation().ask(text, images=[PICTURE], do_sample=False) for text in QUESTIONS}


@pytest.mark.parametrize("picture", [PICTURE, str(PICTURE), Image.open(PICTURE), [PICTURE]], ids=["path", "text", "PIL", "list"])
def test_a_text_and_a_picture(pipe, wanted, picture):
    answer = pipe(("Describe the picture.", picture))
    assert answer.text == wanted["Describe the picture."]
    assert (answer.finish_reason, answer.index) == ("stop", 0)
    assert answer.generate_token_len == len(answer.token_ids) > 10
    assert answer.input_token_len > 16


def test_a_text_alone(pipe, model):
    text = "How many shapes are there?"  # its answer is no tie
    assert pipe(text).text == model.start_conversation().ask(text, do_sample=False)


def test_a_list_is_answered_in_its_order(pipe, wanted, monkeypatch):
    monkeypatch.setattr(offline, "AT_ONCE", 3)  # the last ones wait
    asked = QUESTIONS * 3
    answers = pipe([(text, PICTURE) for text in asked])
    assert [answer.text for answer in answers] == [wanted[text] for text in asked]
    assert [answer.index for answer in answers] == list(range(12))
    assert pipe([]) == []


def test_several_pictures_stand_at_their_marks(pipe, model, tmp_path):
    Image.effect_noise((112, 112), 60).convert("RGB").save(tmp_path / "noise.png")
    pictures = [PICTURE, tmp_path / "noise.png"]
    text = "Image-1: {0}\nImage-2: {0}\nWhich picture has the purple circle?"
    answer = model.start_conversation().ask(text.format("<image>"), images=pictures, do_sample=False)
    assert pipe((text.format("<image>"), pictures)).text == answer
    assert pipe((text.format(offline.IMAGE_TOKEN), pictures)).text == answer


@pytest.mark.parametrize("kind", ["image_url", "image_data"])
def test_messages(pipe, model, kind):
    content = {"url": str(PICTURE)} if kind == "image_url" else {"data": Image.open(PICTURE)}
    first = {"role": "user", "content": [{"type": kind, kind: content}, {"type": "text", "text": "How many shapes are there?"}]}
    conversation = model.start_conversation("Be short.")
    wanted = [conversation.ask(first["content"][1]["text"], images=[PICTURE], do_sample=False)]
    wanted.append(conversation.ask("Which shape is purple?", do_sample=False))
    begun = [{"role": "system", "content": "Be short."}, first]
    going = [*begun, {"role": "assistant", "content": wanted[0]}, {"role": "user", "content": "Which shape is purple?"}]
    assert pipe(begun).text == wanted[0]
    assert [answer.text for answer in pipe([begun, going])] == wanted


def test_a_session_goes_on(pipe, model):
    conversation = model.start_conversation()
    wanted = [conversation.ask("Which shape is purple?", images=[PICTURE], do_sample=False)]
    wanted.append(conversation.ask("Where is it?", do_sample=False))
    first = pipe.chat(("Which shape is purple?", PICTURE))
    second = pipe.chat("Where is it?", session=first)
    assert [first.response.text, second.response.text] == wanted
    assert len(first.turns) == 1, "the first session can be gone on with in another way"
    assert pipe.chat("Where is it?", session=first).response.text == wanted[1]


def test_pieces_come_as_they_are_written(pipe, wanted):
    texts = {0: "", 1: ""}
    last = {}
    for piece in pipe.stream_infer([(text, PICTURE) for text in QUESTIONS[:2]]):
        texts[piece.index] += piece.text
        last[piece.index] = piece
    assert list(texts.values()) == [wanted[text] for text in QUESTIONS[:2]]
    assert all(piece.finish_reason == "stop" for piece in last.values())
    assert sum(bool(piece.text) for piece in pipe.stream_infer((QUESTIONS[0], PICTURE))) > 5


def test_how_it_writes(pipe, wanted):
    text = QUESTIONS[0]
    short = pipe((text, PICTURE), GenerationConfig(max_new_tokens=3))
    assert (short.generate_token_len, short.finish_reason) == (3, "length")
    word = wanted[text].split()[6]
    assert pipe((text, PICTURE), GenerationConfig(stop_words=[word])).text == wanted[text][: wanted[text].index(word)].rstrip()
    assert pipe((text, PICTURE), GenerationConfig(do_sample=True, top_k=1)).text == wanted[text], "LMDeploy's way to be greedy"
    wild = GenerationConfig(do_sample=True, temperature=2.0, random_seed=5)
    drawn = [pipe(text, wild).text for _ in range(2)]
    assert drawn[0] == drawn[1], "without a picture it is unsure, but repeatable"
    apart = pipe([text] * 2, wild)
    assert apart[0].text != apart[1].text


def test_log_probabilities(pipe):
    told = pipe((QUESTIONS[1], PICTURE), GenerationConfig(logprobs=True))
    assert [next(iter(each)) for each in told.logprobs] == told.token_ids
    assert all(-5 < value <= 0 for each in told.logprobs for value in each.values())


def test_schemas(pipe):
    schema = {"type": "string", "enum": ["circle", "star"]}
    wish = GenerationConfig(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    assert pipe((QUESTIONS[1], PICTURE), wish).text in ('"circle"', '"star"')


def test_answers_that_are_not_read_are_given_up(pipe):
    pieces = pipe.stream_infer("Hello", GenerationConfig(max_new_tokens=3000, do_sample=True, temperature=2.0, random_seed=1))
    next(pieces)
    pieces.close()
    assert pipe("Hello").text


@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [
        (5, PromptError, "a int is no prompt"),
        (("a", "b", "c"), PromptError, "a tuple is one prompt"),
        (("What?", "nowhere.png"), PictureError, "nowhere.png does not exist"),
        ([("What?", PICTURE), ("What?", "nowhere.png")], PictureError, "nowhere.png does not exist"),
        (("<image><image>", [PICTURE]), PromptError, "marks"),
        ([{"role": "user"}], PromptError, "messages 0: content: a message of role user needs one"),
        ([{"role": "user", "content": [{"type": "image_data", "image_data": {"data": 5}}]}], PromptError, "not a PIL picture"),
        ("", PromptError, "empty"),
    ],
)
def test_mistakes_are_told(pipe, prompt, kind, message):
    with pytest.raises(kind, match=message):
        pipe(prompt)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 is not positive"),
        ({"temperature": 3}, "temperature 3 is not between 0 and 2"),
        ({"top_p": 0}, "top_p 0 is not above 0"),
        ({"response_format": {"type": "xml"}}, "response_format type: Input should be"),
    ],
)
def test_wishes_are_checked(wish, message):
    with pytest.raises(OptionError, match=message):
        GenerationConfig(**wish)


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(ModelFolderError, match="does not exist"):
        pipeline(tmp_path / "none")
    with pytest.raises(OptionError, match="engine 'other'"):
        pipeline(tmp_path, engine="other")


def test_a_hub_id_is_converted_once_and_a_failure_is_told(shapes, monkeypatch, tmp_path, capfd):
    """The hub is not asked: its client is told to stay offline."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with pytest.raises(ModelFolderError, match="nobody/nothing was not converted: the lines above say why"):
        pipeline("nobody/nothing")
    assert "error: nobody/nothing" in capfd.readouterr().err
    place = tmp_path / "internvl-openvino" / "nobody--nothing-int4"
    assert not place.exists()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(shapes)
    with pipeline("nobody/nothing", cache_size=1) as pipe:
        assert pipe("Hello").text


def test_the_names_are_the_packages_and_load_nothing_before_they_are_used():
    code = "import sys, runtime; print({'torch', 'pydantic'} & set(sys.modules)); from runtime import pipeline, GenerationConfig"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "set()"
