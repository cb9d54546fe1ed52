"""The splits of a data set: their names, and what must be true of them."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from rtl_dist.core.errors import DataError
from rtl_dist.core.text import shorten

TRAIN, VAL, TEST = "train", "val", "test"
SPLIT_ORDER = (TRAIN, VAL, TEST)
# The names under which people keep their splits, in lower case.
SPLIT_OF = {
    "train": TRAIN,
    "training": TRAIN,
    "val": VAL,
    "valid": VAL,
    "validation": VAL,
    "validate": VAL,
    "dev": VAL,
    "eval": VAL,
    "evaluation": VAL,
    "test": TEST,
    "testing": TEST,
}
# The same in other languages, as their speakers call folders.
_IN_OTHER_LANGUAGES = {
    TRAIN: "trainings entrainement apprentissage entrenamiento treino treinamento addestramento"
    " allenamento trening обучение обучающая обучающий трейн 训练 訓練 学習 훈련 학습",
    VAL: "validierung validierungs validación validação validazione validatie walidacja валидация"
    " валидационная проверка 验证 驗證 検証 검증",
    TEST: "tests essai prueba pruebas teste testes prova prove prüfung testowy тест тестовая"
    " тестовый 测试 測試 テスト 테스트 시험",
}
# What people put beside or behind them: train_images, val2017, TestSet, Testdaten, 训练集.
_DECORATION = (
    "set data dataset split image images img imgs photos photo pictures samples folder dir"
    " daten datensatz bilder fotos menge donnees datos imagenes dados imagens dati immagini"
    " данные набор выборка изображения 集 数据 数据集 資料 图片 データ 用 데이터"
)


def _plain(name: str) -> str:
    """Without upper case, accents, and another way to write the same letters."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


_SPLIT_OF_WORD = SPLIT_OF | {
    _plain(word): split for split, words in _IN_OTHER_LANGUAGES.items() for word in words.split()
}
_DECORATING = {"", *map(_plain, _DECORATION.split())}


def _words(name: str) -> list[str]:
    """The words of a name; of a split's, without what is written onto it."""
    words = re.split(r"[\W\d_]+", _plain(name))
    return [word if word in _SPLIT_OF_WORD else _undecorated(word) for word in words]


def _undecorated(word: str) -> str:
    shorter = (word.removesuffix(end) for end in _DECORATING if end)
    return next((one for one in shorter if one in _SPLIT_OF_WORD), word)


def split_named(name: str) -> str | None:
    """The split that a folder or table of this name is, however it is written; None: none.

    ``Training``, ``val2017``, ``test_set`` and ``Testdaten`` are; ``test-strips`` is not.
    """
    rest = [word for word in _words(name) if word not in _DECORATING]
    return _SPLIT_OF_WORD.get(rest[0]) if len(rest) == 1 else None


def splits_in(name: str) -> set[str]:
    """The splits that words of a name are called like."""
    return {_SPLIT_OF_WORD[word] for word in _words(name) if word in _SPLIT_OF_WORD}


def splits_named(names: Sequence[str]) -> dict[str, str]:
    """Those of the names that are a split's, each with its split.

    What all of them share says nothing: ``cars_train`` beside ``cars_test`` is train.
    """
    words = [set(_words(name)) - _DECORATING for name in names]
    shared = set.intersection(*words) - set(_SPLIT_OF_WORD) if len(words) > 1 else set()
    rests = {name: sorted(own - shared) for name, own in zip(names, words, strict=True)}
    return {
        name: _SPLIT_OF_WORD[rest[0]]
        for name, rest in rests.items()
        if len(rest) == 1 and rest[0] in _SPLIT_OF_WORD
    }


def scatter_key(salt: str, name: str) -> bytes:
    """Sorting by this puts names in a fixed pseudo-random order, another for each salt.

    A hash, not a seeded generator: the order depends neither on NumPy's version nor on how many
    other names there are, nor on the order in which the file system lists them.
    """
    return hashlib.sha256(f"{salt}\0{name}".encode("utf-8", "surrogateescape")).digest()


def check_classes_in_splits(
    classes: Sequence[str],
    counts: dict[str, Counter[int]],
    after: str = "",
    *,
    leave_out: str = "leave the class out",
) -> None:
    """Every class must have a sample in every split.

    ``counts`` maps each split to its samples a class number; ``after`` is put behind the message,
    ``leave_out`` says how to do without a class that train has not.

    Raises:
        DataError: names the first such class, its split, how many more there are, and the cure.
    """
    missing = [
        (name, split)
        for split, count in counts.items()
        for i, name in enumerate(classes)
        if not count[i]
    ]
    if missing:
        name, split = missing[0]
        others = [f"{name!r} in {split}" for name, split in missing[1:]]
        also = f" (and so have {shorten(others)})" if others else ""
        in_train = any(split == TRAIN for _, split in missing)
        way_out = leave_out if in_train else "give --allow-missing-classes"
        raise DataError(
            f"class {name!r} has no image in split {split!r}{also}{after}; add images of it there,"
            f" or {way_out}"
        )
