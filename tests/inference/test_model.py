"""A model in Python: any way to give an image, the same answer; what is none is refused."""

import io
import pickle
import threading
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from model_folders import CLASSES, model_folder
from PIL import Image

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.distributed.precision import kernels_set_back, set_determinism
from rtl_dist.inference.model import Model
from rtl_dist.inference.predictor import Predictor

# torchvision 0.29 announces that its decoder will move to another package.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model(model_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (20, 26, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory, pixels):
    path = tmp_path_factory.mktemp("images") / "one.png"
    Image.fromarray(pixels).save(path)
    return path


def test_an_image_may_be_given_in_any_way(model, pixels, path):
    expected = model.predict(path).probabilities
    ways = {
        str(path): str(path),
        "image 0": path.read_bytes(),
        "bytes": bytearray(path.read_bytes()),
        "array": pixels,
        "flipped": np.flip(pixels[:, ::-1], 1),  # a view with negative strides
        "pil": Image.fromarray(pixels),
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
    }
    for name, given in ways.items():
        answer = model.predict(given)
        np.testing.assert_array_equal(answer.probabilities, expected, err_msg=name)
        assert answer.source == (name if "png" in name else "image 0")
    with Image.open(path) as opened:
        assert model.predict(opened).source == str(path)


@pytest.mark.parametrize("shape", [(20, 26), (20, 26, 1)])
def test_grey_pixels_are_what_a_grey_file_is(model, tmp_path, shape):
    grey = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(grey.reshape(20, 26)).save(tmp_path / "grey.png")
    expected = model.predict(tmp_path / "grey.png").probabilities
    np.testing.assert_array_equal(model.predict(grey).probabilities, expected)
    pil = Image.fromarray(grey.reshape(20, 26))
    np.testing.assert_array_equal(model.predict(pil).probabilities, expected)


def test_a_pil_image_is_turned_as_its_file_says(model, tmp_path, pixels):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        found = model.predict(opened).probabilities
    np.testing.assert_array_equal(found, model.predict(tmp_path / "turned.png").probabilities)
    assert (found != model.predict(pixels).probabilities).any()


def zeros(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (zeros(8, 8, 3, dtype=np.float32), r"image 0: an array of float32; .* \(255 \* x\)"),
        (zeros(8, 8, 3, dtype=np.int64), "image 0: an array of int64; pixels are uint8"),
        (zeros(3, 8, 8), r"\(3, 8, 8\) has its channels first; give x.transpose\(1, 2, 0\)"),
        (zeros(8, 8, 4), r"a fourth channel, of transparency; give x\[..., :3\]"),
        (zeros(2, 8, 8, 3), r"is a batch; give a list of images: list\(x\)"),
        (zeros(8), r"an array \(8,\) is no image"),
        (zeros(0, 8, 3), r"an array \(0, 8, 3\) is no image"),
        (torch.zeros(3, 8, 8), r"a tensor torch.float32 \(3, 8, 8\) is no image"),
        (Image.new("I;16", (8, 8)), "a PIL image of mode I;16 has other than 8 bits"),
        (3, "image 0: a int is no image; give a path,"),
        ([zeros(8, 8, 3), None], "image 1: a NoneType is no image"),
    ],
)
def test_what_is_no_image_is_refused_with_the_cure(model, given, words):
    with pytest.raises(UserError, match=words):
        model.predict(given)


def test_a_folder_is_told_where_to_go(model, tmp_path):
    with pytest.raises(
        UserError, match=r"is a folder; rtl_dist.predict\(model, .*\) takes folders"
    ):
        model.predict(tmp_path)


def test_one_that_cannot_be_read_raises_alone_and_says_so_among_others(model, path, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    for bad, words in ((tmp_path / "gone.jpg", "cannot be read"), (tmp_path / "text.jpg", "is ")):
        with pytest.raises(DataError, match=f"^{bad} {words}"):
            model.predict(bad)
    answers = model.predict([path, tmp_path / "gone.jpg", b"", path])
    assert [a.error is None for a in answers] == [True, False, False, True]
    assert answers[1].label is None
    assert answers[1].to_dict() == {"input": str(tmp_path / "gone.jpg"), "error": answers[1].error}
    np.testing.assert_array_equal(answers[0].probabilities, answers[3].probabilities)
    with pytest.raises(DataError, match=r"gone.jpg cannot be read"):
        model.features([path, tmp_path / "gone.jpg"])
    cut = path.read_bytes()[:-30]
    with Image.open(io.BytesIO(cut)) as opened, pytest.raises(DataError, match="cannot be decoded"):
        model.predict(opened)


def test_an_iterator_is_answered_by_one_that_holds_a_block_at_a_time(model, pixels):
    taken = []

    def frames():
        for number in range(1000):
            taken.append(number)
            yield pixels

    answers = model.predict(frames(), block=4)
    assert taken == []
    assert next(answers).source == "image 0"
    assert len(taken) == 4
    assert [next(answers).source for _ in range(4)][-1] == "image 4"
    assert len(taken) == 8
    assert model.predict([]) == []
    assert len(model.predict((pixels, pixels))) == 2
    with pytest.raises(UserError, match="block: 0 images"):
        model.predict([pixels], block=0)


def test_a_result_is_frozen_and_says_what_there_is_to_say(model, path):
    answer = model.predict(path)
    assert answer.label == CLASSES[int(answer.probabilities.argmax())]
    assert answer.probability == answer.probabilities.max()
    assert answer.top(2)[0] == (answer.label, answer.probability)
    assert sum(share for _, share in answer.top(3)) == pytest.approx(1)
    assert answer.set is None
    assert answer.abstained is False
    assert answer.to_dict() == {
        "input": str(path),
        "label": answer.label,
        "probability": round(answer.probability, 6),
    }
    with pytest.raises(FrozenInstanceError):
        answer.source = "another"
    assert pickle.loads(pickle.dumps(answer)).label == answer.label  # to another process


def test_features_are_what_the_head_is_given(model, pixels, path):
    one = model.features(path)
    assert (one.shape, one.dtype) == ((128,), np.float32)
    many = model.features([pixels, pixels[::-1].copy()])
    assert many.shape == (2, 128)
    np.testing.assert_allclose(many[0], one, rtol=1e-5, atol=1e-6)
    streamed = model.features(iter([pixels]))
    np.testing.assert_allclose(next(streamed), one, rtol=1e-5, atol=1e-6)


def test_it_explains_an_answer_and_any_other_class(model, path):
    answer, explained = model.predict(path), model.explain(path)
    assert explained.label == answer.label
    assert explained.exact
    assert explained.heatmap.shape == (2, 2)
    assert explained.picture.size == explained.overlay().size == (16, 16)
    with Image.open(io.BytesIO(explained._repr_png_())) as shown:
        assert shown.size == (16, 16)
    others = model.explain([path, path], "green")
    assert [each.label for each in others] == ["green", "green"]
    with pytest.raises(UserError, match=r"knows no class 'gren'; did you mean green\?"):
        model.explain(path, "gren")


def test_several_labels_have_a_threshold_and_one_has_none(model, path, tmp_path):
    several = Model(model_folder(tmp_path, task=MULTI_LABEL))
    assert several.predict(path, threshold=0.0).labels == CLASSES
    assert several.predict(path, threshold=1.0).labels == ()
    with pytest.raises(UserError, match="threshold: 2 is no probability"):
        several.predict(path, threshold=2)
    with pytest.raises(UserError, match=r"threshold: 0.5 is for several labels"):
        model.predict(path, threshold=0.5)


def test_any_thread_may_use_it(model, path):
    """For heatmaps a network's layers are watched, which is not to be seen by who predicts."""
    expected, map_of_one = model.predict(path).probabilities, model.explain(path).heatmap
    found, maps, failed = [], [], []

    def work(number):
        try:
            for _ in range(20):
                if number % 2:
                    maps.append(model.explain(path).heatmap)
                else:
                    found.append(model.predict(path).probabilities)
        except BaseException as error:  # noqa: BLE001 - told by the test
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(found) == len(maps) == 40
    for probabilities in found:
        np.testing.assert_array_equal(probabilities, expected)
    for heatmap in maps:
        np.testing.assert_array_equal(heatmap, map_of_one)


def test_kernels_are_chosen_as_in_commands_and_the_choice_is_set_back(model, pixels, monkeypatch):
    chosen, compute = [], Predictor.probabilities

    def noting(self, images):
        cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
        chosen.append((cudnn.benchmark, cudnn.deterministic, cuda.matmul.fp32_precision))
        return compute(self, images)

    monkeypatch.setattr(Predictor, "probabilities", noting)
    with kernels_set_back():
        set_determinism(False)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        model.predict(pixels)
        model.explain(pixels)
        assert chosen == [(False, True, "ieee")] * 2
        cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
        after = cudnn.benchmark, cudnn.deterministic, cuda.matmul.fp32_precision
        assert after == (True, False, "tf32")


def test_it_tells_what_it_is(model):
    assert model.classes == CLASSES
    assert model.image_size == 16
    assert "single_label, 3 classes" in repr(model)
    with pytest.raises(UserError, match="is not a model; give a run folder"):
        Model("nowhere")
