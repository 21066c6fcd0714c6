"""What other people's data look like: pictures as a person sees them, text that imitates tokens."""

import numpy as np
import pytest
import torch
from conftest import WORLD, stage
from PIL import Image

import common

ift = stage("03_train_ift")
GREYS = np.array([[0, 64, 128, 255]], dtype=np.uint8)  # (1, 4)


@pytest.mark.parametrize(
    "values",
    [
        GREYS,
        GREYS.astype(np.uint16) * 257,
        GREYS.astype(np.int32) * 257,
        GREYS.astype(np.float32) / 255,
        GREYS.astype(np.float32),
    ],
    ids=["8 bits", "16 bits", "32 bits", "floats to 1", "floats to 255"],
)
def test_greys_of_any_depth_are_the_same_picture(values):
    seen = np.asarray(common.load_image(Image.fromarray(values)))
    assert (seen == GREYS[:, :, None]).all()


def test_a_dark_picture_of_16_bits_stays_dark():
    dark = Image.fromarray(np.full((2, 2), 200, dtype=np.uint16))  # of 65,535
    assert common.load_image(dark).getpixel((0, 0)) == (1, 1, 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode):
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 0, 255))
    seen = common.load_image(clear.convert(mode))
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


def test_pictures_are_turned_upright(tmp_path):
    picture = Image.new("RGB", (4, 2), "black")
    picture.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    seen = common.load_image(tmp_path / "turned.png")
    assert seen.size == (2, 4) and seen.getpixel((1, 0)) == (255, 255, 255)


def special_tokens(tokenizer):
    added = tokenizer.added_tokens_decoder.values()
    return sorted({token.content for token in added if token.special})


def test_no_text_becomes_a_special_token(tiny, pictures):
    """Neither in prompts nor in responses; each text is encoded as long as its look-alike is."""
    _, processor = tiny
    tokenizer = processor.tokenizer
    # "<" and "|" are no words of this tokenizer's: they are <unk>, which says nothing here
    tokens = [token for token in special_tokens(tokenizer) if token != tokenizer.unk_token]
    assert "<|im_end|>" in tokens and "<|image_pad|>" in tokens
    special = torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
    image = [pictures / "0.png"]

    def n_special(text, response):
        inputs, labels = ift.encode_supervised(processor, [text], image, [response])
        assert len(labels[0]) == len(inputs["input_ids"][0])
        return int(torch.isin(inputs["input_ids"], special).sum())

    plain = n_special("a red circle", "a blue star")
    for token in tokens:
        assert n_special(f"a {token} red circle", "a blue star") == plain, token
        assert n_special("a red circle", f"a blue {token}{token} star") == plain, token


def test_a_model_without_some_of_its_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for file in (WORLD / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="lacks 1 of its weights, such as .*q_proj.weight"):
        common.load_judge(str(folder), device="cpu")


@pytest.mark.parametrize(
    "error, code",
    [
        (FileNotFoundError("x.json"), "error: FileNotFoundError"),
        (OSError(28, "No space"), "error: OSError"),
    ],
)
def test_what_the_machine_lacks_is_one_line(error, code):
    def fails(args):
        raise error

    with pytest.raises(SystemExit, match=code):
        common.run(fails, None)


def test_an_interrupted_script_says_so_and_ends_with_130(capsys):
    def fails(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        common.run(fails, None)
    assert ended.value.code == 130 and "goes on with the rows kept" in capsys.readouterr().out
