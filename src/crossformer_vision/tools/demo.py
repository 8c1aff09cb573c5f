"""A page in the browser: a photo, what trained networks see in it, and what each point of it attends to."""

import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossformer_vision.data.images import read
from crossformer_vision.data.readers.digits import MultiScaleDigits
from crossformer_vision.errors import UserError
from crossformer_vision.inference.predictor import Predictor, load_predictor
from crossformer_vision.tools.inspection_page import attention_page

WIDEST = 1600  # pixels of a picture that is sent to the page


def serve(what: Sequence[str], host: str = "127.0.0.1", port: int | None = None, device: Any = None) -> None:
    """Serve the page until it is interrupted.

    Args:
        what: of each network, as for `load_predictor`.
        host: address that it listens on; the default is seen by this machine alone.
        port: None for the first free one from 7860.
        device: to compute on; the best there is if None.

    Raises:
        UserError: gradio is not installed; a port in use; see `load_predictor`.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'crossformer-vision[demo]'") from None
    predictors = {name: load_predictor(name, device) for name in what}
    with tempfile.TemporaryDirectory(prefix="crossformer-demo-") as folder:  # photos do not outlive the page
        os.environ["GRADIO_TEMP_DIR"] = folder
        app = page(predictors, Path(folder))
        try:
            _, url, _ = app.launch(
                server_name=host,
                server_port=port,
                theme=gradio.themes.Default(font="system-ui", font_mono="monospace"),  # nothing is fetched
                prevent_thread_lock=True,
                quiet=True,
                show_error=True,
                footer_links=[],
                ssr_mode=False,
                max_file_size="100mb",
            )
        except OSError:
            where = f"--port {port}" if port else "ports 7860 to 7959"
            raise UserError(
                f"{where} on {host}: cannot be served: in use, or no address of this machine; name another"
            ) from None
        print(f"{url}   (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        finally:
            app.close(verbose=False)


def examples(folder: Path) -> list[str]:
    """Photos that come with scikit-learn, and our digits."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images()
    paths = []
    for name, pixels in zip(photos.filenames, photos.images, strict=True):
        paths.append(_saved(pixels, folder / f"{Path(name).stem}.png"))
    digits, _ = MultiScaleDigits("val", 1, 256, (3, 4), (0.2, 0.6), seed=1)[0]
    paths.append(_saved(digits, folder / "digits.png"))
    return paths


def _saved(image: Any, path: Path) -> str:
    from PIL import Image

    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
    return str(path)


def page(predictors: dict[str, Predictor], folder: Path) -> Any:
    """The page, as gradio's `Blocks`, with the examples in a folder, into which photos are uploaded, too."""
    import gradio as gr

    names = list(predictors)

    def read_photo(sent: dict[str, Any]) -> Any:
        """What was uploaded, as it is: our own reader knows orientation and bits, and says what is wrong."""
        path = Path(sent["path"]).resolve()
        if not path.is_relative_to(folder.resolve()):  # a page sends what it likes
            raise UserError(f"{path.name}: is not a photo of this page")
        return read(path, path.name)

    def shown_error(error: UserError) -> None:
        gr.Warning(str(error), title="This does not work")

    def predicted(sent: dict[str, Any] | None, name: str, score: float) -> tuple[Any, str]:
        if sent is None:
            return None, ""
        predictor = predictors[name]
        predictor.score = score
        try:
            result = predictor(read_photo(sent))
        except UserError as error:
            shown_error(error)
            return None, ""
        drawn = result.plot()
        drawn.thumbnail((WIDEST, WIDEST))
        return drawn, str(result).removeprefix(f"{result.name}: ")

    def clicked(at: gr.SelectData) -> list[int]:
        return list(at.index)

    def attended(sent: dict[str, Any] | None, name: str, stage: int, pixel: list[int] | None) -> Any:
        if sent is None or pixel is None:
            return None
        try:
            photo = read_photo(sent)
            point = ((pixel[0] + 0.5) / photo.width, (pixel[1] + 0.5) / photo.height)
            return attention_page(predictors[name], photo, point, int(stage) - 1, 224)
        except UserError as error:
            shown_error(error)
            return None

    # Their label would lie on what is written in them.
    picture: Any = dict(interactive=False, format="png", show_label=False, buttons=["download", "fullscreen"])
    with gr.Blocks(title="CrossFormer", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown("# CrossFormer\nChoose a photo and see what the network sees in it.")
        with gr.Row():
            with gr.Column():
                photo = gr.Image(sources=["upload", "clipboard"], label="photo", elem_id="photo")
                name = gr.Dropdown(names, value=names[0], label="network", visible=len(names) > 1)
                detects = any(p.task == "detection" for p in predictors.values())
                score = gr.Slider(
                    0.05, 0.95, 0.5, step=0.05, label="least score of an object", visible=detects
                )
                gr.Examples(examples(folder), photo, label="examples")
            with gr.Column():
                result = gr.Image(**picture, elem_id="result")
                text = gr.Textbox(label="in words", interactive=False, elem_id="words")
        gr.Markdown(
            "## What a point attends to\nClick on the photo above: in short distance attention, and in long."
        )
        stage = gr.Slider(1, 4, 3, step=1, label="stage", elem_id="stage")
        attention = gr.Image(**picture, elem_id="attention")
        one_at_a_time: Any = dict(concurrency_id="network", concurrency_limit=1, preprocess=False)
        inputs = [photo, name, score]
        for event in (photo.change, name.change, score.release):
            event(predicted, inputs, [result, text], **one_at_a_time)
        pixel = gr.JSON(visible="hidden")  # x, y of the last click; preprocess=False does not pass a gr.State
        photo.change(lambda: (None, None), None, [attention, pixel])
        selected = photo.select(clicked, None, pixel, preprocess=False)
        for event in (selected.then, name.change):
            event(attended, [photo, name, stage, pixel], attention, **one_at_a_time)
        stage.change(
            attended, [photo, name, stage, pixel], attention, trigger_mode="always_last", **one_at_a_time
        )
    return app
