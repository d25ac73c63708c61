"""An image-text-to-text model of transformers that labels in process, on an actor with a GPU or a share of one.

Its answers are JSON of the form by construction: at each step only tokens that may follow in that form are allowed
(llguidance, which vLLM uses too). Samples are asked one at a time, so that an answer does not depend on others that
happen to be asked with it, and the most likely token is taken. Answers are kept like an endpoint's.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from domainshuttle.pipelines.curation.labels.config import LabelConfig
from domainshuttle.pipelines.curation.model_folders import load_labeller, model_digest
from domainshuttle.pipelines.endpoints.answers import Answers
from domainshuttle.pipelines.endpoints.client import Answer, Question, judged

if TYPE_CHECKING:
    import torch

_MOST_TEXT, _MOST_WORD = 1200, 60
"""Characters of a text and of a word of the answer: of a model that can't end one it is cut, and the answer has its
form."""


class LocalModel:
    """Asks a model of a local folder. Raises DataError for one that can't be used."""

    by: Literal["endpoint", "transformers"] = "transformers"

    def __init__(self, config: LabelConfig, answers: str) -> None:
        import torch
        from llguidance.hf import from_tokenizer

        assert config.model is not None
        self.config, self.answers_kept = config, Answers(Path(answers))
        self.digest = model_digest(config.model, "labeller")
        self.name = f"{Path(config.model).name}:{self.digest[:12]}"
        self.device = "cuda" if config.actors.gpus else "cpu"
        torch.set_num_threads(max(1, int(config.actors.cpus)))
        self.model, self.processor = load_labeller(config.model, self.device)
        self.tokens = from_tokenizer(self.processor.tokenizer, eos_token=_ends(self.model, self.processor))

    def answers(self, questions: Sequence[Question]) -> Iterable[Answer]:
        return map(self._answer, questions)

    def _answer(self, question: Question) -> Answer:
        key = self._digest(question)
        content = self.answers_kept.find(key)
        cached = content is not None
        if content is None:
            content = {"prompt": question.prompt, "model": self.name, **self._generated(question)}
            content["state"] = judged(question, key, content).state
            self.answers_kept.keep(key, content, 0.0)
        return judged(question, key, content, cached)

    def _digest(self, question: Question) -> str:
        asked = {
            "model": self.digest, "most": self.config.answer_tokens, "prompt": question.prompt,
            "system": question.system, "text": question.text, "form": question.form.model_json_schema(),
            "pictures": [hashlib.blake2b(data, digest_size=16).hexdigest() for data in question.pictures],
        }  # fmt: skip
        return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()

    def _generated(self, question: Question) -> dict[str, str]:
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in question.pictures]
        schema = _bounded(question.form.model_json_schema())
        text = f"{question.system}\n{question.text}\nAnswer with one JSON object of this schema: {json.dumps(schema)}"
        content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device, dtype=self.model.dtype)
        asked = inputs["input_ids"].shape[1]
        form = _Form(self.tokens, schema, asked)
        with torch.inference_mode():
            found = self.model.generate(
                **inputs,
                max_new_tokens=self.config.answer_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([form.allow]),
                stopping_criteria=StoppingCriteriaList([form.ended]),
            )
        answer = self.processor.tokenizer.decode(found[0, asked:], skip_special_tokens=True)
        return {"text": answer, "finish": "stop" if form.whole else "length"}


def _ends(model: Any, processor: Any) -> int | list[int]:
    """The tokens that end an answer, as the model's own settings say, or its tokenizer's."""
    ends: int | list[int] | None = model.generation_config.eos_token_id
    return processor.tokenizer.eos_token_id if ends is None else ends


class _Form:
    """Follows one answer token by token, and says which may come next."""

    def __init__(self, tokens: Any, schema: dict[str, Any], asked: int) -> None:
        from llguidance import LLMatcher

        self.matcher = LLMatcher(tokens, LLMatcher.grammar_from_json_schema(schema, overrides=_PLAIN))
        if self.matcher.is_error():
            raise RuntimeError(f"the form of the answer is no grammar: {self.matcher.get_error()}")
        self.seen = asked

    def allow(self, ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Takes the tokens that came, and forbids all that can't come next."""
        import torch

        self._follow(ids)
        allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        short = scores.shape[1] - len(allowed)
        if short > 0:  # entries of the model's table that are no tokens
            allowed = torch.nn.functional.pad(allowed, (0, short))
        return scores.masked_fill(~allowed[: scores.shape[1]].to(scores.device), float("-inf"))

    def ended(self, ids: "torch.Tensor", scores: "torch.Tensor", **_: Any) -> "torch.Tensor":
        """Whether the answer is whole."""
        import torch

        self._follow(ids)
        return torch.full((len(ids),), self.whole, dtype=torch.bool, device=ids.device)

    @property
    def whole(self) -> bool:
        return bool(self.matcher.is_stopped()) and not self.matcher.is_error()

    def _follow(self, ids: "torch.Tensor") -> None:
        for token in ids[0, self.seen :].tolist():
            self.matcher.consume_token(token)
        self.seen = ids.shape[1]


_PLAIN: Any = {"whitespace_flexible": False}
"""No blanks between the parts of the answer: a model could write them without end."""


def _bounded(schema: Any) -> Any:
    """A schema whose free texts have an end."""
    if isinstance(schema, list):
        return [_bounded(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    bounded = {name: _bounded(value) for name, value in schema.items()}
    if schema.get("type") == "string" and "enum" not in schema:
        bounded["maxLength"] = _MOST_WORD if schema.get("title") == "Word" else _MOST_TEXT
    return bounded
