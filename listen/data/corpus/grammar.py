"""The built-in corpus's language: a small grammar with a Chinese translation and questions about every sentence."""

import zlib
from dataclasses import dataclass

import numpy as np

PERSONS = {
    "doctor": "医生", "teacher": "老师", "farmer": "农民", "sailor": "水手", "baker": "面包师", "singer": "歌手",
    "soldier": "士兵", "student": "学生", "captain": "船长", "nurse": "护士", "pilot": "飞行员", "engineer": "工程师",
    "grandmother": "奶奶", "king": "国王",
}  # fmt: skip
ADJECTIVES = {
    "young": "年轻的", "tall": "高大的", "clever": "聪明的", "famous": "有名的", "quiet": "安静的",
    "friendly": "友好的", "hungry": "饥饿的", "brave": "勇敢的",
}  # fmt: skip
VERBS = {
    "found": "找到了", "sold": "卖了", "bought": "买了", "carried": "搬了", "painted": "画了", "lost": "丢了",
    "opened": "打开了", "washed": "洗了", "repaired": "修了", "borrowed": "借了",
}  # fmt: skip
COLOURS = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "black": "黑色", "white": "白色",
    "purple": "紫色", "orange": "橙色",
}  # fmt: skip
OBJECTS = {  # with the classifier that Chinese asks for
    "basket": ("个", "篮子"), "table": ("张", "桌子"), "window": ("扇", "窗户"), "letter": ("封", "信"),
    "guitar": ("把", "吉他"), "bottle": ("个", "瓶子"), "carpet": ("块", "地毯"), "mirror": ("面", "镜子"),
    "bicycle": ("辆", "自行车"), "hammer": ("把", "锤子"), "umbrella": ("把", "雨伞"), "blanket": ("条", "毯子"),
    "candle": ("支", "蜡烛"), "suitcase": ("个", "箱子"), "camera": ("台", "相机"), "piano": ("架", "钢琴"),
}  # fmt: skip
PLACES = {
    "in the garden": "在花园里", "in the kitchen": "在厨房里", "at the market": "在市场", "at the station": "在车站",
    "near the river": "在河边", "near the harbour": "在港口附近", "behind the church": "在教堂后面",
    "behind the school": "在学校后面", "under the bridge": "在桥下", "inside the castle": "在城堡里",
    "outside the library": "在图书馆外", "outside the village": "在村子外",
}  # fmt: skip
TIMES = {
    "yesterday": "昨天", "this morning": "今天早上", "last night": "昨晚", "on monday": "星期一",
    "last winter": "去年冬天", "before breakfast": "早饭前", "after dinner": "晚饭后", "in december": "十二月",
}  # fmt: skip
CALLS = {"called": "拨打了", "remembered": "记住了"}
DIGITS = {
    "zero": "零", "one": "一", "two": "二", "three": "三", "four": "四", "five": "五", "six": "六", "seven": "七",
    "eight": "八", "nine": "九",
}  # fmt: skip

_FACT_TABLES: dict[str, dict[str, object]] = {
    "person": PERSONS, "quality": ADJECTIVES, "action": VERBS, "colour": COLOURS, "object": OBJECTS, "place": PLACES,
    "time": TIMES, "call": CALLS,
}  # fmt: skip

NUMBER_SHARE = 0.25
QUESTIONS = {
    "person": ("who {verb} something?", "who is it about?"),
    "quality": ("what is the {person} like?", "how is the {person} described?"),
    "action": ("what happened to the {object}?", "what was done with the {object}?"),
    "colour": ("what colour is the {object}?", "which colour is it?"),
    "object": ("what was {verb}?", "which thing was {verb}?"),
    "place": ("where did it happen?", "where was the {person}?"),
    "time": ("when did it happen?", "when was it?"),
    "number": ("which number is it?", "what number did the {person} say?"),
}


@dataclass(frozen=True)
class Sentence:
    """An English sentence (lower-case words), its translation and the facts that questions ask for."""

    text: str
    translation: str
    facts: dict[str, str]

    @property
    def words(self) -> list[str]:
        """The sentence's words."""
        return self.text.split()


def split_of_sentence(text: str) -> str:
    """Return the only split that may hold the sentence `text`: a checksum decides, whatever the seed."""
    remainder = zlib.crc32(text.encode()) % 10
    return {0: "test", 1: "dev"}.get(remainder, "train")


def draw_sentence(rng: np.random.Generator, split: str) -> Sentence:
    """Draw a sentence of `split` ("train", "dev" or "test"): somebody does something to a thing, or calls a number.

    Raises:
        ValueError: unknown `split`.
    """
    if split not in ("train", "dev", "test"):
        raise ValueError(f"Unknown split {split!r}: choose 'train', 'dev' or 'test'.")
    sentence = _draw_any_sentence(rng)
    while split_of_sentence(sentence.text) != split:
        sentence = _draw_any_sentence(rng)
    return sentence


def _draw_any_sentence(rng: np.random.Generator) -> Sentence:
    slots = {"person": _pick(rng, PERSONS)}
    if rng.random() < 0.6:
        slots["quality"] = _pick(rng, ADJECTIVES)
    if rng.random() < 0.6:
        slots["place"] = _pick(rng, PLACES)
    if "place" not in slots or rng.random() < 0.4:
        slots["time"] = _pick(rng, TIMES)
    if rng.random() < NUMBER_SHARE:
        return _number_sentence(slots, rng)
    return _object_sentence(slots, rng)


def draw_question(sentence: Sentence, rng: np.random.Generator) -> tuple[str, str]:
    """Draw a question about `sentence` and its answer."""
    fact = _pick(rng, [name for name in QUESTIONS if name in sentence.facts])
    wording = QUESTIONS[fact][int(rng.integers(len(QUESTIONS[fact])))]
    answer = sentence.facts[fact]
    verb = sentence.facts.get("action", sentence.facts.get("call"))
    return wording.format(verb=verb, **sentence.facts), answer


def parse_sentence(text: str) -> Sentence:
    """The sentence, with translation and facts, that was drawn as `text`.

    Raises:
        ValueError: the grammar does not write `text`.
    """
    facts = {name: found for name, table in _FACT_TABLES.items() if (found := _first_of(table, text))}
    digits = [word for word in text.split() if word in DIGITS]
    if digits:
        facts["number"] = " ".join(digits)
    needed = {"call", "number"} if digits else {"action", "colour", "object"}
    if not needed | {"person"} <= facts.keys():
        raise ValueError(f"{text!r} is no sentence of the corpus: of {sorted(needed | {'person'})} it has {facts}")
    english, chinese = (_number_predicate if digits else _object_predicate)(facts)
    return _frame(facts, english, chinese, time_first=text.startswith(facts.get("time", "the ")))


def _first_of(table: dict[str, object], text: str) -> str | None:
    return next((phrase for phrase in table if f" {phrase} " in f" {text} "), None)


def spoken_words() -> list[str]:
    """Every word that a sentence can hold, sorted."""
    tables = (PERSONS, ADJECTIVES, VERBS, COLOURS, OBJECTS, PLACES, TIMES, CALLS, DIGITS)
    phrases = [*(phrase for table in tables for phrase in table), "the", "a", "an", "number"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def _object_sentence(slots: dict[str, str], rng: np.random.Generator) -> Sentence:
    facts = {**slots, "action": _pick(rng, VERBS), "colour": _pick(rng, COLOURS), "object": _pick(rng, OBJECTS)}
    return _frame(facts, *_object_predicate(facts), time_first=rng.random() < 0.5)


def _object_predicate(facts: dict[str, str]) -> tuple[str, str]:
    article = "an" if facts["colour"][0] in "aeiou" else "a"
    classifier, thing = OBJECTS[facts["object"]]
    english = f"{facts['action']} {article} {facts['colour']} {facts['object']}"
    return english, f"{VERBS[facts['action']]}一{classifier}{COLOURS[facts['colour']]}的{thing}"


def _number_sentence(slots: dict[str, str], rng: np.random.Generator) -> Sentence:
    digits = [_pick(rng, DIGITS)]
    while len(digits) < 3:  # never the same digit twice in a row
        digits.append(_pick(rng, [digit for digit in DIGITS if digit != digits[-1]]))
    facts = {**slots, "call": _pick(rng, CALLS), "number": " ".join(digits)}
    return _frame(facts, *_number_predicate(facts), time_first=True)


def _number_predicate(facts: dict[str, str]) -> tuple[str, str]:
    digits = "".join(DIGITS[digit] for digit in facts["number"].split())
    return f"{facts['call']} number {facts['number']}", f"{CALLS[facts['call']]}号码{digits}"


def _frame(facts: dict[str, str], english: str, chinese: str, time_first: bool) -> Sentence:
    time, place, quality = (facts.get(name, "") for name in ("time", "place", "quality"))
    subject = f"the {quality} {facts['person']}"
    order = [time, subject, english, place] if time_first else [subject, english, place, time]
    translation = [
        TIMES.get(time, ""), ADJECTIVES.get(quality, ""), PERSONS[facts["person"]], PLACES.get(place, ""), chinese
    ]  # fmt: skip
    return Sentence(" ".join(" ".join(order).split()), "".join(translation), facts)


def _pick(rng: np.random.Generator, options: "dict[str, object] | list[str]") -> str:
    names = list(options)
    return names[int(rng.integers(len(names)))]
