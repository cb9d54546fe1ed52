"""Pictures of what a model says: colours that mean what they say, text that is read."""

import numpy as np
import pytest
import torch
from PIL import Image

from rtl_dist.inference.pictures import Cell, grid, picture_of, png_of, with_heatmap

LINES = ("Staffordshire bullterrier of the neighbours  97.1 %", "cat 2.0 %", "2024/IMG_0001.jpg")


def cells(count, side=64, **options):
    picture = Image.new("RGB", (side, side), (0, 200, 0))
    return [Cell(picture=picture, lines=LINES, **options) for _ in range(count)]


def test_a_map_is_orange_where_it_speaks_for_the_class_and_blue_where_against_it():
    places = np.zeros((4, 4), dtype=np.float32)
    places[0, 0], places[3, 3] = 5.0, -2.5
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    pixels = np.asarray(with_heatmap(grey, places)).astype(int)
    red, _, blue = pixels[4, 4]
    assert red > blue + 80
    red, _, blue = pixels[60, 60]
    assert blue > red + 30
    assert red > pixels[4, 4][2]  # half as strong: more of the picture is left
    np.testing.assert_array_equal(pixels[4, 40], 128)
    nothing = np.asarray(with_heatmap(grey, np.zeros((2, 2), dtype=np.float32)))
    np.testing.assert_array_equal(nothing, np.asarray(grey))


@pytest.mark.parametrize("channels", [1, 3])
def test_what_a_network_saw_is_a_picture(channels):
    image = torch.arange(channels * 4, dtype=torch.uint8).view(channels, 2, 2)
    picture = picture_of(image)
    assert picture.mode == "RGB"
    assert list(picture.getpixel((1, 0))) == image[:, 0, 1].expand(3).tolist()


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (4, 2, 2), (64, 8, 8)])
def test_a_grid_is_as_readable_of_many_as_of_few(count, columns, rows):
    sheet = grid(cells(count), title="runs/photos")
    assert sheet.width // columns >= 152
    assert sheet.height // rows >= 152
    assert sheet.width <= 1400
    green = (np.asarray(sheet) == (0, 200, 0)).all(2)
    assert green.sum() >= count * 152 * 152  # each is there
    ink = np.asarray(sheet.convert("L"))[:, : sheet.width // columns] < 100
    assert ink.any(1).sum() >= rows * 20  # of text


def test_it_shows_64_and_no_more():
    assert grid(cells(70)).size == grid(cells(64)).size


def test_a_label_that_is_too_long_is_cut_and_its_figure_is_not():
    def text(line):
        sheet = grid([Cell(picture=None, lines=(line,))] * 64)
        return np.asarray(sheet.crop((0, 160, 176, 190)))  # below the first picture

    whole = text("x" * 60 + "  97.1 %")
    other = text("x" * 90 + "  97.1 %")
    np.testing.assert_array_equal(whole, other)
    assert (text("x" * 60 + "  12.3 %") != whole).any()


def test_an_input_without_a_picture_keeps_its_place_and_nothing_gives_a_page():
    empty = np.asarray(grid([Cell(picture=None, lines=("cannot be read",))]))
    assert (empty == 238).all(2).sum() > 300 * 300
    page = np.asarray(grid([], title="No mistakes"))
    assert (page < 100).any()


def test_heatmaps_stand_beside_their_pictures():
    with_maps = grid(cells(6, heatmap=Image.new("RGB", (64, 64), (200, 0, 0))))
    red = (np.asarray(with_maps) == (200, 0, 0)).all(2).sum()
    assert red == (np.asarray(with_maps) == (0, 200, 0)).all(2).sum() > 0


def test_equal_pictures_are_equal_bytes():
    assert png_of(grid(cells(2))) == png_of(grid(cells(2)))
