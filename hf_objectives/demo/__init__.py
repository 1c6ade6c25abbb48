"""The built-in corpus: short, checkable skills as text, chats, preferences and rewards; a tokenizer and a tiny model.

Everything is a pure function of a seed; nothing is downloaded. The quickstart and the tests run on it.
"""

from hf_objectives.demo.accuracy import exact_match  # share of questions that a model answers rightly
from hf_objectives.demo.corpus import SYSTEM, TOOLS, answer_reward, chats, preferences, questions, texts, write
from hf_objectives.demo.model import CHAT_TEMPLATE, build_model, build_tokenizer
from hf_objectives.demo.skills import SKILLS, Question

__all__ = [
    "CHAT_TEMPLATE",
    "SKILLS",
    "SYSTEM",
    "TOOLS",
    "Question",
    "answer_reward",
    "build_model",
    "build_tokenizer",
    "chats",
    "preferences",
    "questions",
    "texts",
    "write",
]
