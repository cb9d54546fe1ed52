"""Lists, names and sizes as people read them."""

import pytest

from rtl_dist.core.text import and_more, did_you_mean, readable_size, shorten, shown


def test_a_list_is_cut_where_it_gets_long():
    names = [str(n) for n in range(1, 8)]
    assert shorten(names[:5]) == "1, 2, 3, 4, 5"
    assert shorten(names) == "1, 2, 3, 4, 5 and 2 more"
    assert shorten(names, most=1) == "1 and 6 more"
    assert shorten(names, form=" and {:,} others") == "1, 2, 3, 4, 5 and 2 others"
    assert shorten([]) == ""


def test_what_is_not_shown_is_counted():
    assert and_more(1234) == " and 1,234 more"
    assert and_more(2, ", and {:,} more shards") == ", and 2 more shards"
    assert and_more(0) == and_more(-3) == ""


@pytest.mark.parametrize(
    ("name", "form", "hint"),
    [
        ("optm", "{}", "; did you mean optim?"),
        ("OPTIM", "{!r}", "; did you mean 'optim'?"),
        ("cifar1O", "that by {!r}", "; did you mean that by 'CIFAR10'?"),
        ("elephant", "{}", ""),
    ],
)
def test_the_nearest_name_is_proposed(name, form, hint):
    assert did_you_mean(name, ["seed", "optim", "CIFAR10"], form) == hint


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (2.55e6, "2.5 MB"), (3e12, "3000.0 GB")],
)
def test_sizes(num_bytes, text):
    assert readable_size(num_bytes) == text


@pytest.mark.parametrize(
    "name", ["naïve café", "東京\u3000駅", "Rosa\u00a0alba", "क\u094d\u200dष", "\U0001fae8"]
)
def test_names_of_any_language_are_shown_as_they_are(name):
    assert shown(name) == name


@pytest.mark.parametrize("sign", ["\n", "\x1b", "\x9b", "\u2028", "\u202e", "\udcff", "\U000e0041"])
def test_what_a_terminal_would_obey_is_escaped(sign):
    assert sign not in shown(f"a{sign}b")
    assert shown(f"a{sign}b").isascii()
