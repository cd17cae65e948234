"""transformers' pipelines on patched models: their results are those of the model itself, with the prefix."""

import numpy as np
import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

import apt_kernels
from helpers import models
from helpers.patched import randomise

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
TEXT = "w1 w5 w9 w2"
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION |= {"image_size": 16, "patch_size": 8, "initializer_range": 0.2}
_IMAGES = {"size": {"height": 16, "width": 16}}
PIXELS = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)


def tokenizer():
    words = Tokenizer(tokenizer_models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *_words()])}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    return t.PreTrainedTokenizerFast(tokenizer_object=words, **names, eos_token="[SEP]")


def _words():
    return [f"w{i}" for i in range(94)]


def patched(model):
    apt_kernels.patch(model.eval(), prefix_length=4, init_seed=0)
    randomise(model)
    return model


def text_model(family, head, **options):
    return patched(models.build(family, head, **options))


def image_model(auto, config):
    torch.manual_seed(0)
    return patched(getattr(t, auto).from_config(config))


def picture():
    from PIL import Image

    return Image.fromarray(PIXELS)


def labelled(probabilities, config):
    return {config.id2label[i]: p.item() for i, p in enumerate(probabilities)}


def scores(found):
    return {row["label"]: row["score"] for row in found}


def text_classification():
    model, words = text_model("bert", "AutoModelForSequenceClassification", num_labels=3), tokenizer()
    pipe = t.pipeline("text-classification", model=model, tokenizer=words, top_k=None)
    return (
        model,
        lambda: scores(pipe([TEXT])[0]),
        lambda: labelled(logits(model, words(TEXT))[0].softmax(-1), model.config),
    )


def token_classification():
    model, words = text_model("roberta", "AutoModelForTokenClassification", num_labels=3), tokenizer()
    pipe = t.pipeline("token-classification", model=model, tokenizer=words, ignore_labels=[])

    def expected():
        best = logits(model, words(TEXT))[0, 1:-1].softmax(-1).max(-1)
        return {f"{i} {model.config.id2label[k.item()]}": v.item() for i, (v, k) in enumerate(zip(*best), 1)}

    return model, lambda: {f"{e['index']} {e['entity']}": float(e["score"]) for e in pipe(TEXT)}, expected


def fill_mask():
    model, words = text_model("electra", None), tokenizer()
    pipe, text = t.pipeline("fill-mask", model=model, tokenizer=words, top_k=5), "w1 [MASK] w9"

    def expected():
        best = logits(model, words(text))[0, 2].softmax(-1).topk(5)
        return {str(token.item()): p.item() for p, token in zip(*best)}

    return model, lambda: {str(e["token"]): e["score"] for e in pipe(text)}, expected


def zero_shot_classification():
    labels = {"id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1}}
    model, words = text_model("bert", "AutoModelForSequenceClassification", num_labels=2, **labels), tokenizer()
    pipe = t.pipeline("zero-shot-classification", model=model, tokenizer=words)
    asked = ["w20", "w30", "w40"]

    def found():
        given = pipe(TEXT, asked, hypothesis_template="w7 {}")
        return dict(zip(given["labels"], given["scores"]))

    def expected():
        entailed = torch.stack([logits(model, words(TEXT, f"w7 {label}"))[0, 1] for label in asked])
        return dict(zip(asked, entailed.softmax(0).tolist()))

    return model, found, expected


def text_generation():
    model, words = text_model("llama", None), tokenizer()
    pipe = t.pipeline("text-generation", model=model, tokenizer=words)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "max_length": None}

    def found():
        return {pipe(TEXT, return_tensors=True, **options)[0]["generated_token_ids"].__str__(): 1.0}

    def expected():
        ids = torch.tensor([words(TEXT).input_ids])
        for _ in range(8):  # without a cache, one forward for each token
            with torch.no_grad():
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        return {str(ids[0].tolist()): 1.0}

    return model, found, expected


def feature_extraction():
    model, words = text_model("bert", "AutoModel"), tokenizer()
    pipe = t.pipeline("feature-extraction", model=model, tokenizer=words)

    def expected():
        with torch.no_grad():
            return numbered(model(**tensors(words(TEXT))).last_hidden_state)

    return model, lambda: numbered(torch.tensor(pipe(TEXT))), expected


def image_classification():
    model = image_model("AutoModelForImageClassification", t.ViTConfig(**_VISION, num_labels=3))
    reader = t.ViTImageProcessor(**_IMAGES)
    pipe = t.pipeline("image-classification", model=model, image_processor=reader)

    def expected():
        with torch.no_grad():
            return labelled(model(**reader(picture(), return_tensors="pt")).logits[0].softmax(-1), model.config)

    return model, lambda: scores(pipe(picture())), expected


def image_feature_extraction():
    model, reader = image_model("AutoModel", t.ViTConfig(**_VISION)), t.ViTImageProcessor(**_IMAGES)
    pipe = t.pipeline("image-feature-extraction", model=model, image_processor=reader)

    def expected():
        with torch.no_grad():
            return numbered(model(**reader(picture(), return_tensors="pt")).last_hidden_state)

    return model, lambda: numbered(torch.tensor(pipe(picture()))), expected


def depth_estimation():
    shape = {**_VISION, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4}
    config = t.DPTConfig(**shape, fusion_hidden_size=8, head_in_index=-1, reassemble_factors=[4, 2, 1, 0.5])
    model, reader = image_model("AutoModelForDepthEstimation", config), t.DPTImageProcessor(**_IMAGES)
    pipe = t.pipeline("depth-estimation", model=model, image_processor=reader)

    def expected():
        with torch.no_grad():
            found = model(**reader(picture(), return_tensors="pt")).predicted_depth
        return numbered(torch.nn.functional.interpolate(found[:, None], (16, 16), mode="bicubic", align_corners=False))

    return model, lambda: numbered(pipe(picture())["predicted_depth"]), expected


def object_detection():
    config = t.YolosConfig(**{**_VISION, "image_size": [16, 16]}, num_detection_tokens=4, num_labels=3)
    model = image_model("AutoModelForObjectDetection", config)
    reader = t.YolosImageProcessor(**_IMAGES, do_pad=False)
    pipe = t.pipeline("object-detection", model=model, image_processor=reader, threshold=0.0)

    def expected():
        with torch.no_grad():
            best = model(**reader(picture(), return_tensors="pt")).logits[0].softmax(-1)[:, :-1].max(-1)
        return {str(i): score.item() for i, score in enumerate(best.values.sort(descending=True).values)}

    def found():
        return {str(i): score for i, score in enumerate(sorted((e["score"] for e in pipe(picture())), reverse=True))}

    return model, found, expected


def audio_classification():
    shape = {"conv_dim": (8, 8), "conv_stride": (5, 5), "conv_kernel": (10, 5), "num_feat_extract_layers": 2}
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = t.Wav2Vec2Config(**shape, **size, num_labels=3, initializer_range=0.2, num_conv_pos_embeddings=4)
    config.num_conv_pos_embedding_groups, config.classifier_proj_size = 2, 8
    model, reader = image_model("AutoModelForAudioClassification", config), t.Wav2Vec2FeatureExtractor()
    pipe = t.pipeline("audio-classification", model=model, feature_extractor=reader)
    sound = np.random.default_rng(0).standard_normal(800).astype(np.float32)

    def expected():
        with torch.no_grad():
            given = reader(sound, sampling_rate=16000, return_tensors="pt")
            return labelled(model(**given).logits[0].softmax(-1), model.config)

    return model, lambda: scores(pipe(sound)), expected


def tensors(given):
    return {name: torch.tensor([value]) for name, value in given.items() if name != "token_type_ids"}


@torch.no_grad()
def logits(model, given):
    kinds = {"token_type_ids": torch.tensor([given["token_type_ids"]])} if "token_type_ids" in given else {}
    return model(**tensors(given), **kinds).logits


def numbered(tensor):
    return {str(i): value for i, value in enumerate(tensor.flatten().tolist())}


TASKS = {
    "audio-classification": audio_classification,
    "depth-estimation": depth_estimation,
    "feature-extraction": feature_extraction,
    "fill-mask": fill_mask,
    "image-classification": image_classification,
    "image-feature-extraction": image_feature_extraction,
    "object-detection": object_detection,
    "text-classification": text_classification,
    "text-generation": text_generation,
    "token-classification": token_classification,
    "zero-shot-classification": zero_shot_classification,
}


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_gives_what_the_model_gives(task):
    model, found, expected = TASKS[task]()
    given = found()
    assert given == pytest.approx(expected(), rel=1e-4, abs=1e-5)  # sums in another order, in float32
    with apt_kernels.disabled(model):
        assert found() != pytest.approx(given, rel=1e-2, abs=1e-3), "the prefix has no influence"
    assert found() == given
