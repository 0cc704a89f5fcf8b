"""Lessons of the small world."""
import random
from collections.abc import Iterator
from rwkv_speech.synthetic.lessons import Lesson, Turn
class WorldLessons:
    def draw(self, rng: random.Random, held_out: bool = False) -> Lesson: ...
    def texts(self) -> Iterator[str]: ...
