"""python tests/bench_script.py FOLDER QUESTION PICTURE TOKENS: ten lines by which openvino_genai answers, for tests.bench."""

import sys

import numpy as np
import openvino as ov
import openvino_genai
from PIL import Image

folder, question, picture, tokens = sys.argv[1:]
pipe = openvino_genai.VLMPipeline(folder, "CPU")
image = ov.Tensor(np.asarray(Image.open(picture).convert("RGB"))[None])
pipe.generate(question, images=[image], max_new_tokens=int(tokens), streamer=lambda text: print(text, end="", flush=True))
