"""The built-in corpus: short, checkable skills as text, chats, preferences and rewards; a tokenizer and a tiny model.

Everything is a pure function of a seed; nothing is downloaded. The quickstart and the tests run on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.demo.corpus import (
        CARELESS,  # A careless annotator: the share of wrong answers of some skills
        SYSTEM,  # The system message of conversations with a tool
        TOOLS,  # The schema of the calculator
        answer_reward,  # Reward right answers, with TRL's signature
        chats,  # Make conversations, some of which call the calculator
        exam,  # Make as many distinct questions of every skill
        preferences,  # Make preference pairs
        questions,  # Make questions of a split
        texts,  # Make documents
        write,  # Write the corpus to files
    )
    from hf_objectives.demo.model import (
        CHAT_TEMPLATE,  # ChatML with tools
        build_model,  # Make a tiny Llama with random weights
        build_tokenizer,  # Train a byte-level BPE on the corpus
        exact_match,  # Measure the share of questions that a model answers rightly
        expected,  # What a model has to say to a question
    )
    from hf_objectives.demo.skills import (
        FACTS,  # Skills with few questions, whose answers stand in the texts
        HARD,  # Skills that a tiny model does not learn in minutes
        SKILLS,  # The generators of questions, by name
        Question,  # A question with its right and its wrong answer
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
