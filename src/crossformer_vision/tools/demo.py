"""Web demo that shows predictions for an image and the attention of a selected point."""

import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossformer_vision.data.images import load_image
from crossformer_vision.data.readers.digits import MultiScaleDigits
from crossformer_vision.errors import UserError, missing_extra
from crossformer_vision.inference.load import load_predictor
from crossformer_vision.inference.predictor import DetectionPredictor, Predictor
from crossformer_vision.tools.inspection_page import attention_page
from crossformer_vision.types import JsonObject, Kwargs

if TYPE_CHECKING:
    import gradio as gr

MAX_SIDE = 1600  # longer side of pictures on the page, in pixels


def serve(
    sources: Sequence[str], host: str = "127.0.0.1", port: int | None = None, device: str | None = None
) -> None:
    """Serve the page until it is interrupted.

    Args:
        sources: Sources of ``load_predictor``.
        host: Address to bind to. The default is reachable from this machine only.
        port: Port. ``None`` for the first free one from 7860.
        device: Device to compute on. ``None`` for the best available.

    Raises:
        UserError: If gradio is not installed, the port is in use, or a source cannot be loaded.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise missing_extra(error, "demo") from None
    predictors = {name: load_predictor(name, device) for name in sources}
    with tempfile.TemporaryDirectory(
        prefix="crossformer-demo-"
    ) as folder:  # uploads are removed with the page
        os.environ["GRADIO_TEMP_DIR"] = folder
        app = build_page(predictors, Path(folder))
        try:
            _, url, _ = app.launch(
                server_name=host,
                server_port=port,
                # Fonts of the system: nothing is downloaded.
                theme=gradio.themes.Default(font="system-ui", font_mono="monospace"),
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
                f"{where} on {host}: in use, or not an address of this machine. Choose another"
            ) from None
        print(f"{url}   (Ctrl-C stops it)", flush=True)
        try:
            threading.Event().wait()
        finally:
            app.close(verbose=False)


def examples(folder: Path) -> list[str]:
    """Photos that scikit-learn bundles, and digits, as files in a folder."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images()
    paths = []
    for name, pixels in zip(photos.filenames, photos.images, strict=True):
        paths.append(_save(pixels, folder / f"{Path(name).stem}.png"))
    digits, _ = MultiScaleDigits("val", 1, 256, (3, 4), (0.2, 0.6), seed=1)[0]
    paths.append(_save(digits, folder / "digits.png"))
    return paths


def _save(image: Image.Image | NDArray[np.uint8], path: Path) -> str:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
    return str(path)


class PageHandlers:
    """Event handlers of the page. Errors of the user are shown as warnings.

    Args:
        predictors: Predictors by name.
        folder: Folder of uploads and examples.
    """

    def __init__(self, predictors: dict[str, Predictor], folder: Path) -> None:
        self.predictors, self.folder = predictors, folder.resolve()

    def read_photo(self, sent: JsonObject) -> Image.Image:
        """Read an upload with the library's own reader, for orientation, bit depth and error messages.

        Raises:
            UserError: If it is not an image of this page.
        """
        path = Path(sent["path"]).resolve()
        if not path.is_relative_to(self.folder):  # clients may send any path
            raise UserError(f"{path.name}: is not an upload or example of this page")
        return load_image(path, path.name)

    def predict(self, sent: JsonObject | None, name: str, score: float) -> tuple[Image.Image | None, str]:
        """Plot and text of a prediction.

        Args:
            sent: Uploaded photo.
            name: Name of the predictor.
            score: Score threshold of a detector.
        """
        if sent is None:
            return None, ""
        predictor = self.predictors[name]
        if isinstance(predictor, DetectionPredictor):
            predictor.score_threshold = score
        try:
            result = predictor(self.read_photo(sent))
        except UserError as error:
            _show_warning(error)
            return None, ""
        plot = result.plot()
        plot.thumbnail((MAX_SIDE, MAX_SIDE))
        return plot, str(result).removeprefix(f"{result.name}: ")

    def draw_attention(
        self, sent: JsonObject | None, name: str, stage: int, pixel: list[int] | None
    ) -> Image.Image | None:
        """Attention of a pixel.

        Args:
            sent: Uploaded photo.
            name: Name of the predictor.
            stage: Stage, from 1.
            pixel: x and y of the last click.
        """
        if sent is None or pixel is None:
            return None
        try:
            self.predictors[name].require_rgb("the page")
            photo = self.read_photo(sent)
            point = ((pixel[0] + 0.5) / photo.width, (pixel[1] + 0.5) / photo.height)
            return attention_page(self.predictors[name], photo, point, int(stage) - 1, 224)
        except UserError as error:
            _show_warning(error)
            return None


def _show_warning(error: UserError) -> None:
    import gradio

    gradio.Warning(str(error), title="Cannot process this image")


def build_page(predictors: dict[str, Predictor], folder: Path) -> "gr.Blocks":
    """Build the page.

    Args:
        predictors: Predictors by name.
        folder: Folder of uploads and examples.

    Returns:
        gradio's ``Blocks``.
    """
    import gradio as gr

    def clicked_pixel(event: gr.SelectData) -> list[int]:
        return list(event.index)

    names, handlers = list(predictors), PageHandlers(predictors, folder)
    # Labels would cover text in the pictures.
    view: Kwargs = dict(interactive=False, format="png", show_label=False, buttons=["download", "fullscreen"])
    with gr.Blocks(title="CrossFormer", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown("# CrossFormer\nChoose a photo to see what the model predicts.")
        with gr.Row():
            with gr.Column():
                photo = gr.Image(sources=["upload", "clipboard"], label="photo", elem_id="photo")
                name = gr.Dropdown(names, value=names[0], label="model", visible=len(names) > 1)
                has_detector = any(p.task == "detection" for p in predictors.values())
                score = gr.Slider(0.05, 0.95, 0.5, step=0.05, label="score threshold", visible=has_detector)
                gr.Examples(examples(folder), photo, label="examples")
            with gr.Column():
                result = gr.Image(**view, elem_id="result")
                text = gr.Textbox(label="prediction", interactive=False, elem_id="words")
        gr.Markdown(
            "## Attention of a point\nClick on the photo above to see its short- and long-distance attention."
        )
        stage = gr.Slider(1, 4, 3, step=1, label="stage", elem_id="stage")
        attention = gr.Image(**view, elem_id="attention")
        one_at_a_time: Kwargs = dict(concurrency_id="network", concurrency_limit=1, preprocess=False)
        inputs = [photo, name, score]
        for event in (photo.change, name.change, score.release):
            event(handlers.predict, inputs, [result, text], **one_at_a_time)
        pixel = gr.JSON(visible="hidden")  # last click; gr.State needs preprocess
        photo.change(lambda: (None, None), None, [attention, pixel])
        selected = photo.select(clicked_pixel, None, pixel, preprocess=False)
        for event in (selected.then, name.change):
            event(handlers.draw_attention, [photo, name, stage, pixel], attention, **one_at_a_time)
        stage.change(
            handlers.draw_attention,
            [photo, name, stage, pixel],
            attention,
            trigger_mode="always_last",
            **one_at_a_time,
        )
    return app
