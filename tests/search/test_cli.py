import json
import subprocess
import sys

from PIL import Image

from declip.interchange.declip_file import write_declip_file
from declip.models.dual_encoder import DualEncoder
from declip.search.index import Index
from indices import tiny_model
from text_encoders import bert


def test_embed_search_and_look_after(weights_file, folder, tmp_path, command):
    index, query = tmp_path / "index", folder / "red-bar.png"
    embed = ["embed", weights_file, folder, "--out", index, "--dtype", "float32", "--quiet"]
    made = command(*embed)
    assert (made.status, made.err) == (0, "")
    assert "24 images, 16 numbers each in float32" in made.out

    found, drawn = tmp_path / "found.json", tmp_path / "found.png"
    search = ["search", index, "--image", query, "-k", 3, "--json", found, "--contact-sheet", drawn]
    assert command(*search).out.splitlines()[1].split()[1:3] == ["1.000", "red-bar.png"]
    hits = json.loads(found.read_text())["hits"]
    assert (hits[0]["key"], hits[0]["path"], len(hits)) == ("red-bar.png", str(query), 3)
    assert Image.open(drawn).mode == "RGB"
    query.unlink()
    assert "23 images" in command(*embed).out
    assert "23 images" in command("index", "show", index).out


def test_explain_draws_a_map_over_an_image(weights_file, folder, tmp_path, command):
    image, out = folder / "red-bar.png", tmp_path / "map.png"
    printed = command("explain", weights_file, image, "a red bar", "--out", out).out
    assert "40 × 40 pixels" in printed
    assert Image.open(out).size == Image.open(image).size
    for wrong in (("none.png", "red"), (image, " "), (__file__, "red")):
        failed = command("explain", weights_file, *wrong, "--out", tmp_path / "other.png")
        assert failed.status == 2
        assert not (tmp_path / "other.png").exists()


def test_a_precision_that_the_device_emulates_is_refused(weights_file, folder, tmp_path, command):
    given = ["--device", "cpu", "--precision", "fp16"]
    for words in (
        ["embed", weights_file, folder, "--out", tmp_path / "index"],
        ["evaluate", weights_file, "--dataset", "builtin:emoji-test"],
        ["classify", folder, "--classes", "red,blue", "--model", weights_file],
    ):
        refused = command(*words, *given)
        assert refused.status == 2
        assert "fp16" in refused.err
        assert "--precision" in refused.err
    assert not (tmp_path / "index").exists()


def test_lines_into_a_pipe_are_neither_cut_nor_wrapped(weights_file, folder, tmp_path, command):
    caption, index = " ".join(["a red circle"] * 60), tmp_path / ("a long name " * 10)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "shapes/red-circle.png", "caption": caption}) + "\n")
    assert command("embed", weights_file, tmp_path / "pairs.jsonl", "--out", index, "--quiet").status == 0
    _, line = command("search", index, "red").out.splitlines()
    assert line.rstrip().endswith(caption)
    assert str(index) in command("index", "show", index).out.splitlines()[0]


def loaded_by(code, *names):
    """Which of some modules a program imports."""
    ending = f"\nprint(*(name for name in {names} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}{ending}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def test_the_package_and_its_commands_import_no_torch():
    assert loaded_by("import declip", "torch", "numpy", "typer", "pydantic") == []
    assert loaded_by("import declip.search.info", "torch", "scipy", "huggingface_hub") == []
    assert loaded_by("import declip.cli.app", "torch", "scipy", "numpy", "pydantic", "yaml", "jinja2") == []


def test_a_text_search_builds_no_image_tower(folder, tmp_path, command):
    own = tiny_model()
    changes = {"hf_model": str(bert(tmp_path / "bert")), "context_length": 24}
    recipe = own.recipe.model_copy(update={"text": own.recipe.text.model_copy(update=changes)})
    code = "import declip.search.index as i"
    for name, model in (("own", own), ("encoder", DualEncoder.from_recipe(recipe))):
        write_declip_file(model, tmp_path / f"{name}.safetensors")
        assert (
            command("embed", tmp_path / f"{name}.safetensors", folder, "--out", tmp_path / name, "--quiet").status == 0
        )
        code += f"\ni.Index.open({str(tmp_path / name)!r}).search('red', k=3)"
    names = ("timm", "torchvision", "transformers", "wandb", "pandas", "matplotlib", "torch._dynamo", "torch")
    assert loaded_by(code, *names) == ["torch"]
    # The text tower alone finds what the model finds.
    for name in ("own", "encoder"):
        parts, whole = Index.open(tmp_path / name), Index.open(tmp_path / name, model=tmp_path / f"{name}.safetensors")
        assert whole.model.image_tower.proj is not None
        assert [(hit.key, hit.score) for hit in parts.search("red")] == [(h.key, h.score) for h in whole.search("red")]
