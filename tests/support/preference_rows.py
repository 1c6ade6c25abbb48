"""Turns and preference rows that tests of pairs share, and what a pair spells."""

from __future__ import annotations


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
PROMPT = [user("What is 2+2?")]
CHOSEN, REJECTED = [said("It is four.")], [said("Five, I think.")]
TURNS = [user("Hi"), said("Hello!"), user("What is 2+2?")]


def parts(tokenizer, pair):
    return [tokenizer.decode(pair[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]


def masked(tokenizer, pair, side):
    return tokenizer.decode([i for i, on in zip(pair[f"{side}_ids"], pair[f"{side}_mask"], strict=True) if on])
