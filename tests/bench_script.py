"""python tests/bench_script.py FOLDER QUESTION PICTURE: the ten lines in which openvino_genai answers, for tests.bench to time."""

import sys

import numpy as np
import openvino as ov
import openvino_genai
from PIL import Image

folder, question, picture = sys.argv[1:]
pipe = openvino_genai.VLMPipeline(folder, "CPU")
image = ov.Tensor(np.asarray(Image.open(picture).convert("RGB"))[None])
pipe.generate(question, images=[image], max_new_tokens=16, streamer=lambda text: print(text, end="", flush=True))
