"""What answers over HTTP: a page to draw on, and what a picture shows as JSON."""

import io
from importlib.resources import files

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse
from ray import serve

from ray_mnist.classifier import Classifier
from ray_mnist.errors import RequestError

MOST_BYTES = 32 * 2**20  # of a picture: a photograph has some 10 MB

app = FastAPI(title="ray_mnist")


@serve.deployment
@serve.ingress(app)
class Service:
    """A trained model behind HTTP.

    Args:
        classifier: the model.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    @app.get("/", response_class=HTMLResponse)
    def page(self) -> str:
        """The page to draw on."""
        return (files("ray_mnist.serving") / "page.html").read_text()

    @app.post("/predict")
    async def predict(self, request: Request) -> dict[str, float]:
        """The probability of each class, the most likely first, for the picture that is the request's body."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                raise HTTPException(413, f"A picture may have {MOST_BYTES:,} bytes at most.")
        try:
            (chances,) = self.classifier.look_at([io.BytesIO(body)])
        except RequestError as error:
            raise HTTPException(422, str(error)) from error
        return dict(sorted(chances.items(), key=lambda pair: -pair[1]))
