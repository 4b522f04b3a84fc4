"""The words of the scenes: names, printed words, questions and answers in English and Chinese, as tables.

Knows nothing of pictures; the scenes fill the fields in braces.
"""

# ruff: noqa: RUF001 - questions are asked in Chinese too

from __future__ import annotations

from collections.abc import Iterator

COLOURS = {  # name -> (Chinese, RGB)
    "red": ("红色", (220, 40, 40)),
    "orange": ("橙色", (245, 140, 25)),
    "yellow": ("黄色", (240, 215, 40)),
    "green": ("绿色", (40, 160, 60)),
    "blue": ("蓝色", (45, 80, 215)),
    "purple": ("紫色", (140, 60, 175)),
    "pink": ("粉色", (248, 145, 195)),
    "black": ("黑色", (35, 35, 35)),
}
INKS = ("red", "orange", "green", "blue", "purple", "black")  # of printed words: the colours that stand out on a pale ground
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "五角星", "diamond": "菱形", "cross": "十字"}
SIZES = {"small": "小", "large": "大"}
PLACES = {  # name -> Chinese, row by row of the 3 x 3 cells
    **{"top left": "左上角", "top": "上方", "top right": "右上角"},
    **{"left": "左侧", "center": "中间", "right": "右侧"},
    **{"bottom left": "左下角", "bottom": "下方", "bottom right": "右下角"},
}
LINES = {"top": "上方", "middle": "中间", "bottom": "下方"}
RELATIONS = {"left": "左边", "right": "右边", "above": "上边", "below": "下边"}
DIRECTIONS = {"left": ("向左", (-1, 0)), "right": ("向右", (1, 0)), "up": ("向上", (0, -1)), "down": ("向下", (0, 1))}
ORDINALS = {"first": "第一", "second": "第二", "third": "第三", "fourth": "第四", "fifth": "第五"}
LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"

# Real words among the printed ones; the others are made up. Their checksums spread them over the splits like any other word.
REAL_WORDS = """
ACT AGE AIR ANT ARM ART BAG BED BEE BOX BOY BUS CAP CAR CAT COW CUP DAY DOG EAR EGG EYE FAN FLY FOX FUN GAS HAT HEN HOT ICE INK
JAM JET JOB KEY KIT LEG LIP LOG MAP MAT MIX MUD NET NUT OAK OIL OWL PAN PEN PIG POT RAT RED ROW RUN SEA SKY SUN TAX TEA TOP TOY
VAN WAX WEB WIN YES ZOO BABY BALL BANK BEAR BELL BIRD BLUE BOAT BOOK CAKE CARD CITY COAT COLD DESK DOOR DUCK FARM FILM FIRE FISH
FLAG FOOD FROG GAME GATE GIFT GOLD HAND HILL HOME HOPE IRON JUMP KING KITE LAKE LAMP LEAF LINE LION LOVE MARS MILK MOON NAME NEST
OPEN PARK PATH PLAY POEM QUIZ RAIN RING ROAD ROCK ROSE SALT SAND SHIP SHOE SHOP SNOW SOAP SOCK SONG STAR TIME TREE WALK WALL WAVE
WIND WOLF WOOD YARD ZERO APPLE BEACH BREAD BRICK CHAIR CLOCK CLOUD DANCE DREAM EAGLE EARTH FIELD FRUIT GLASS GRAPE GREEN HEART
HELLO HORSE HOUSE JUICE LEMON LIGHT MONEY MOUSE MUSIC NIGHT OCEAN PAPER PIANO PLANT QUEEN RADIO RIVER ROBOT SHEEP SMILE SPOON STONE
STORM SUGAR TABLE TIGER TRAIN WATCH WATER WHALE WORLD ZEBRA ANIMAL AUTUMN BOTTLE BRIDGE BUTTER CAMERA CASTLE CIRCUS COFFEE DINNER
DOCTOR DRAGON FAMILY FLOWER FOREST FRIEND GARDEN GUITAR HAMMER ISLAND JACKET JUNGLE KITTEN LADDER MARKET MIRROR MONKEY ORANGE
PENCIL PEPPER PLANET POCKET RABBIT ROCKET SCHOOL SILVER SPIDER SPRING SUMMER TEMPLE TOMATO TUNNEL VIOLIN WINDOW WINTER YELLOW
"""
WORDS = REAL_WORDS.split()

# What is asked and answered. Fields in braces are filled with words of the tables above; a question has one or more wordings.
TEXTS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "thing": ("{colour} {shape}",),
        "part": ("a {size} {colour} {shape} at the {place}",),
        "row_part": ("a {colour} {shape}",),
        "row": ("in a row: {parts}.",),
        "column": ("in a column: {parts}.",),
        "word_part": ('the word "{text}" in {colour}',),
        "number_part": ('the number "{text}" in {colour}',),
        "line_part": ("{part} at the {line}",),
        "bar_part": ("{colour} {value}",),
        "chart": ("a bar chart: {parts}.",),
        "describe": ("Describe the picture.", "What is in this picture?"),
        "describe_image": ("Describe Image-{n}.",),
        "shape_of": ("What shape is {colour}?", "Which shape is {colour}?"),
        "shape_only": ("What shape is it?", "What shape is this?"),
        "colour_of": ("What colour is the {shape}?",),
        "colour_only": ("What colour is the shape?", "What colour is it?"),
        "colour_word": ("What colour is the word?",),
        "colour_number": ("What colour is the number?",),
        "count": ("How many shapes are there?",),
        "count_colour": ("How many {colour} shapes are there?",),
        "count_shape": ("How many of the shape {shape} are there?",),
        "where": ("Where is the {thing}?",),
        "what_at": ("What is at the {place}?",),
        "beside": ("Is the {thing} left or right of the {other}?",),
        "over": ("Is the {thing} above or below the {other}?",),
        "nth_left": ("What colour is the {nth} shape from the left?",),
        "nth_top": ("What colour is the {nth} shape from the top?",),
        "nth_shape_left": ("What is the {nth} shape from the left?",),
        "nth_shape_top": ("What is the {nth} shape from the top?",),
        "word": ("What word is written?", "Read the word."),
        "number": ("What number is written?", "Read the number."),
        "line": ("Read the {line} line.", "What does the {line} line say?"),
        "text_left": ("Read the text on the left.",),
        "text_right": ("Read the text on the right.",),
        "text_top": ("Read the text at the top.",),
        "text_bottom": ("Read the text at the bottom.",),
        "small": ("Read the small text.", "What does the small text say?"),
        "page": ("Read the text.",),
        "bar": ("What is the value of the {colour} bar?", "How high is the {colour} bar?"),
        "highest": ("Which bar is the highest?",),
        "lowest": ("Which bar is the lowest?",),
        "bars": ("How many bars are there?",),
        "more": ("Which picture has more shapes?",),
        "same_count": ("both the same",),
        "which": ("Which picture has the {thing}?",),
        "count_in": ("How many shapes are in Image-{n}?",),
        "colour_in": ("What colour is the {shape} in Image-{n}?",),
        "picture": ("Image-{n}",),
        "moves": ("Which way does the {thing} move?",),
        "it_moves": ("Which way does it move?",),
        "where_in": ("Where is the {thing} in Frame{n}?",),
        "what_moves": ("What moves?",),
        "it_where": ("Where is it?",),
        "it_size": ("Is it small or large?",),
        "it_colour": ("What colour is it?",),
        "it_shape": ("What shape is it?",),
        "it_first": ("What is its first letter?",),
        "it_last": ("What is its last letter?",),
        "it_first_digit": ("What is its first digit?",),
        "it_length": ("How many letters does it have?",),
        "it_digits": ("How many digits does it have?",),
    },
    "zh": {
        "thing": ("{colour}的{shape}",),
        "part": ("{place}有{size}的{colour}的{shape}",),
        "row_part": ("{colour}的{shape}",),
        "row": ("从左到右：{parts}。",),
        "column": ("从上到下：{parts}。",),
        "word_part": ('{colour}的单词"{text}"',),
        "number_part": ('{colour}的数字"{text}"',),
        "line_part": ("{line}是{part}",),
        "bar_part": ("{colour}{value}",),
        "chart": ("柱状图：{parts}。",),
        "describe": ("描述这张图片。", "图片里有什么？"),
        "describe_image": ("描述Image-{n}。",),
        "shape_of": ("{colour}的是什么形状？",),
        "shape_only": ("这是什么形状？",),
        "colour_of": ("{shape}是什么颜色？",),
        "colour_only": ("这个形状是什么颜色？",),
        "colour_word": ("单词是什么颜色？",),
        "colour_number": ("数字是什么颜色？",),
        "count": ("一共有几个形状？",),
        "count_colour": ("有几个{colour}的形状？",),
        "count_shape": ("有几个{shape}？",),
        "where": ("{thing}在哪里？",),
        "what_at": ("{place}是什么？",),
        "beside": ("{thing}在{other}的左边还是右边？",),
        "over": ("{thing}在{other}的上边还是下边？",),
        "nth_left": ("从左数{nth}个形状是什么颜色？",),
        "nth_top": ("从上数{nth}个形状是什么颜色？",),
        "nth_shape_left": ("从左数{nth}个是什么形状？",),
        "nth_shape_top": ("从上数{nth}个是什么形状？",),
        "word": ("写的是什么单词？",),
        "number": ("写的是什么数字？",),
        "line": ("{line}一行写的是什么？",),
        "text_left": ("左边写的是什么？",),
        "text_right": ("右边写的是什么？",),
        "text_top": ("上边写的是什么？",),
        "text_bottom": ("下边写的是什么？",),
        "small": ("小字写的是什么？",),
        "page": ("写的是什么？",),
        "bar": ("{colour}的柱子是多少？",),
        "highest": ("哪个柱子最高？",),
        "lowest": ("哪个柱子最低？",),
        "bars": ("一共有几个柱子？",),
        "more": ("哪张图片的形状更多？",),
        "same_count": ("一样多",),
        "which": ("哪张图片有{thing}？",),
        "count_in": ("Image-{n}有几个形状？",),
        "colour_in": ("Image-{n}的{shape}是什么颜色？",),
        "picture": ("Image-{n}",),
        "moves": ("{thing}往哪边移动？",),
        "it_moves": ("它往哪边移动？",),
        "where_in": ("{thing}在Frame{n}的哪里？",),
        "what_moves": ("什么在移动？",),
        "it_where": ("它在哪里？",),
        "it_size": ("它是大还是小？",),
        "it_colour": ("它是什么颜色？",),
        "it_shape": ("它是什么形状？",),
        "it_first": ("它的第一个字母是什么？",),
        "it_last": ("它的最后一个字母是什么？",),
        "it_first_digit": ("它的第一个数字是什么？",),
        "it_length": ("它有几个字母？",),
        "it_digits": ("它有几个数字？",),
    },
}
# Exercises: asked in training only, and not part of the training text of the tokenizer.
EXERCISES = {
    "en": {
        "colours": "What colour are the shapes?",
        "places": "Where are the shapes?",
        "counts": "How many of the shapes are there?",
        "colour_counts": "How many of the colour are there?",
        "pictures": "Which picture has the shapes?",
        "moves": "Which way do the shapes move?",
        "pair": "{name} {value}",
    },
    "zh": {
        "colours": "形状是什么颜色？",
        "places": "形状在哪里？",
        "counts": "形状有几个？",
        "colour_counts": "颜色有几个？",
        "pictures": "哪张图片有形状？",
        "moves": "形状往哪边移动？",
        "pair": "{name}{value}",
    },
}
JOINT = {"en": ", ", "zh": "，"}


def literals() -> Iterator[str]:
    """Every fixed piece of text that questions and answers are made of, for the training of a tokenizer."""
    tables: list[dict] = [COLOURS, SHAPES, SIZES, PLACES, LINES, RELATIONS, DIRECTIONS, ORDINALS]
    for table in tables:
        for word, entry in table.items():
            yield from (word, f" {word}", entry[0] if isinstance(entry, tuple) else entry)
    for texts in TEXTS.values():
        for wordings in texts.values():
            for wording in wordings:
                yield from _between_braces(wording)
    yield from ("Image-", "Frame", ": ", "\n", *JOINT.values())


def _between_braces(wording: str) -> Iterator[str]:
    for piece in wording.split("{"):
        yield piece.split("}")[-1]
