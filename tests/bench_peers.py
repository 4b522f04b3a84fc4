"""python -m tests.bench_peers PEER FOLDER: one of those whose answers `tests.bench` times, a process that does as it is told.

Tasks come as lines of JSON on standard input, figures go back the same way. All peers get the same folder, pictures, questions and
numbers of tokens, and are idle while another one works.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from runtime.parts.memory import peak_bytes

PROPERTIES: dict[str, Any] = json.loads(os.environ.get("BENCH_PROPERTIES", "{}"))  # of OpenVINO, for ours and openvino_genai
QUESTION, SECOND_QUESTION = "Describe this picture.", "What colour is it?"
BATCH = [f"What is number {number} in this picture?" for number in range(8)]


class Ours:
    """Our conversation, without guessed tokens: random weights repeat themselves, which would flatter it."""

    options = {"do_sample": False, "prompt_lookup_num_tokens": 0}  # noqa: RUF012

    def __init__(self, folder: Path, cache: Path | None = None):
        from runtime.answer.model import OpenedModel

        self.imported = time.perf_counter()
        self.model = OpenedModel(folder, cache_dir=cache, ov_config=PROPERTIES)
        self.talk = self.model.start_conversation()

    def first(self, image: Path, tokens: int, *, again: bool = False) -> dict[str, float]:
        """A picture that was never seen, or with `again` one that was; what all prompts begin with is known, to the others too."""
        talk = self.model.start_conversation()
        times: list[float] = []

        def progress(stage: str, done: int, total: int) -> None:
            if stage == "prefill" and not times:
                times.append(time.perf_counter())

        started = time.perf_counter()
        asked = SECOND_QUESTION if again else QUESTION
        talk.ask(asked, images=[image], max_new_tokens=tokens, progress=progress, **self.options)
        told = talk.statistics
        vision = times[0] - started
        return figures(told.first_token_seconds, told.token_seconds, told.prompt_tokens) | {
            "vision": vision,
            "prefill": told.first_token_seconds - vision,
        }

    def frames(self, images: list[Path]) -> dict[str, float]:
        """Several pictures at once, a tile each, none of them known."""
        self.model.forget()
        talk = self.model.start_conversation()
        talk.ask(QUESTION, images=images, max_tiles=1, max_new_tokens=1)
        return {"first_token": talk.statistics.first_token_seconds, "encoded": talk.statistics.encoded_tiles}

    def begin(self, text: str, image: Path | None, tokens: int) -> dict[str, float]:
        """The first turn of a conversation."""
        self.talk = self.model.start_conversation()
        return self.turn(text, image, tokens)

    def turn(self, text: str, image: Path | None, tokens: int) -> dict[str, float]:
        """The next turn."""
        self.talk.ask(text, images=[image] if image else [], max_new_tokens=tokens, **self.options)
        told = self.talk.statistics
        assert told is not None
        return figures(told.first_token_seconds, told.token_seconds, told.prompt_tokens)

    def batch(self, image: Path, tokens: int) -> dict[str, float]:
        """Eight questions about a picture of one tile each; the features are not kept between them."""
        import numpy as np

        from runtime import Question

        self.model.forget()
        started = time.perf_counter()
        with Image.open(image) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        questions = []
        for number, text in enumerate(BATCH):  # eight different pictures
            own = pixels.copy()
            own[0, 0] = number
            questions.append(Question(text, images=own, max_tiles=1))
        self.model.ask_batch(questions, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return throughput(tokens, time.perf_counter() - started)


class Genai:
    """openvino_genai.VLMPipeline with its default backend."""

    def __init__(self, folder: Path, cache: Path | None = None):
        import openvino_genai

        self.imported = time.perf_counter()
        self.folder, self.genai, self.batching = folder, openvino_genai, None
        self.pipeline = openvino_genai.VLMPipeline(folder, "CPU", **PROPERTIES, **({"CACHE_DIR": str(cache)} if cache else {}))

    def config(self, tokens: int) -> Any:
        """Greedy, exactly so many tokens."""
        config = self.genai.GenerationConfig()
        config.do_sample, config.max_new_tokens, config.ignore_eos = False, tokens, True
        return config

    def first(self, image: Path, tokens: int, *, again: bool = False) -> dict[str, float]:
        """It keeps the keys and values of prompts that it has seen, and no features of pictures."""
        question = SECOND_QUESTION if again else QUESTION
        return self.measured(self.pipeline.generate(question, images=[pixels(image)], generation_config=self.config(tokens)))

    def begin(self, text: str, image: Path | None, tokens: int) -> dict[str, float]:
        """The first turn of a conversation."""
        self.pipeline.start_chat()
        return self.turn(text, image, tokens)

    def turn(self, text: str, image: Path | None, tokens: int) -> dict[str, float]:
        """The next turn."""
        given = {"images": [pixels(image)]} if image else {}
        return self.measured(self.pipeline.generate(text, generation_config=self.config(tokens), **given))

    def measured(self, answer: Any) -> dict[str, float]:
        """Its own clock."""
        told = answer.perf_metrics
        first, vision = told.get_ttft().mean / 1000, told.get_prepare_embeddings_duration().mean / 1000
        found = figures(first, told.get_tpot().mean / 1000, told.get_num_input_tokens())
        return found | {"vision": vision, "prefill": first - vision}

    def batch(self, image: Path, tokens: int) -> dict[str, float]:
        """Its continuous batching, opened when it is first asked."""
        if self.batching is None:
            scheduler = self.genai.SchedulerConfig()
            scheduler.cache_size = 2
            self.batching = self.genai.ContinuousBatchingPipeline(str(self.folder), scheduler, "CPU", PROPERTIES)
        started = time.perf_counter()
        images = [[pixels(image)] for _ in BATCH]
        self.batching.generate(BATCH, images=images, generation_config=[self.config(tokens) for _ in BATCH])
        return throughput(tokens, time.perf_counter() - started)


class Optimum:
    """optimum-intel's OVModelForVisualCausalLM."""

    def __init__(self, folder: Path, cache: Path | None = None):
        from optimum.intel.openvino import OVModelForVisualCausalLM
        from transformers import AutoTokenizer

        self.imported = time.perf_counter()
        config = {"CACHE_DIR": str(cache)} if cache else {}
        self.model = OVModelForVisualCausalLM.from_pretrained(folder, trust_remote_code=True, ov_config=config)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    def first(self, image: Path, tokens: int, *, again: bool = False) -> dict[str, float]:
        """Timed by a streamer: its first call is the prompt's."""
        times: list[float] = []

        class Clock:
            def put(self, _: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        started = time.perf_counter()
        with Image.open(image) as picture:
            given = self.model.preprocess_inputs(
                text=QUESTION, image=picture.convert("RGB"), tokenizer=self.tokenizer, config=self.model.config
            )
        self.model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=Clock())
        times = times[-tokens:]
        return figures(times[0] - started, (times[-1] - times[0]) / (tokens - 1), given["input_ids"].shape[1])


def figures(first: float, token: float | None, prompt_tokens: int) -> dict[str, float]:
    return {"first_token": first, "token": token or 0.0, "prompt_tokens": prompt_tokens}


def throughput(tokens: int, seconds: float) -> dict[str, float]:
    return {"tokens_a_second": tokens * len(BATCH) / seconds, "seconds": seconds}


def pixels(image: Path) -> Any:
    """A picture as openvino_genai takes it."""
    import numpy as np
    import openvino as ov

    with Image.open(image) as picture:
        return ov.Tensor(np.asarray(picture.convert("RGB"))[None])


PEERS = {"ours": Ours, "tuned": Ours, "genai": Genai, "optimum": Optimum}


def main() -> None:
    """Open the folder, tell how long that and its imports took, and do what is told."""
    name, folder, *cache = sys.argv[1:]
    started = time.perf_counter()
    peer = PEERS[name](Path(folder), *map(Path, cache))
    print(json.dumps({"import": peer.imported - started, "open": time.perf_counter() - peer.imported}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        call = task.pop("task")
        if call == "peak":
            print(json.dumps({"peak_gb": peak_bytes() / 1e9}), flush=True)
        else:
            print(json.dumps(getattr(peer, call)(**task)), flush=True)


if __name__ == "__main__":
    main()
