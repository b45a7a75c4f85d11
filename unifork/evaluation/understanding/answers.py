"""What an answer says: a model's text goes in, yes, no or a normalized text comes out."""


def pope_yes(answer: str) -> bool:
    """POPE's own rule: no if the first sentence has the word `No`, `no` or `not`, otherwise yes.

    Kept as published, because reported numbers rest on it: an empty answer, `NO` and `no!` are all yes.
    """
    words = answer.split(".", maxsplit=1)[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def strict_yes(answer: str) -> bool | None:
    """True for `yes`, False for `no`, in any case and with or without a full stop; None for anything else."""
    return {"yes": True, "no": False}.get(normalized(answer))


def normalized(answer: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(answer.lower().split()).removesuffix(".").rstrip()
