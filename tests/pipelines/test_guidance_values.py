"""Ways to guide that are passed in: equal to the peer's guiders at zero tolerance, and at work in pipelines."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks import LayerSkipConfig
from tasks import call, difference, folder, pair, set_scheduler

import suffuse
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.guidance_interval import GuidanceInterval
from suffuse.diffusion.loop import Step
from suffuse.diffusion.projected_guidance import AdaptiveProjectedGuidance, TangentialGuidance
from suffuse.diffusion.safe_guidance import SafeGuidance
from suffuse.diffusion.self_attention_guidance import SelfAttentionGuidance
from suffuse.diffusion.semantic_guidance import Concept, SemanticGuidance
from suffuse.diffusion.weighted_prompts import Weighted
from suffuse.diffusion.worse_guidance import AutoGuidance, Skipped, Unattended, WorseGuidance
from suffuse.diffusion.zero_star_guidance import ZeroStarGuidance
from suffuse.errors import InputError

QUICK = {"num_inference_steps": 3}
STEPS = 4


@dataclass
class Spoken:
    """A denoiser whose predictions are known."""

    predictions: dict[str, torch.Tensor]

    def __call__(self, step: Step, branches: tuple[str, ...]) -> dict[str, torch.Tensor]:
        return {branch: self.predictions[branch] for branch in branches}


def way(guidance, guider, branches=("cond", "uncond"), names=("pred_cond", "pred_uncond")):
    """The largest difference on a way of predictions of every size."""
    worst = 0.0
    for index in range(STEPS):
        generator = torch.Generator().manual_seed(index)
        predictions = [torch.randn(2, 4, 8, 6, generator=generator) * 10 ** (index - 1) for _ in branches]
        step = Step(predictions[0], STEPS, index)
        ours = guidance(Spoken(dict(zip(branches, predictions, strict=True))), step)
        guider.set_state(index, STEPS, torch.tensor(0))
        if index == 0 and getattr(guider, "adaptive_projected_guidance_momentum", None) is not None:
            from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

            guider.momentum_buffer = MomentumBuffer(guider.adaptive_projected_guidance_momentum)
        worst = max(worst, difference(ours, guider.forward(**dict(zip(names, predictions, strict=True))).pred))
    return worst


@pytest.mark.parametrize("rescale", [0.0, 0.6])
@pytest.mark.parametrize("momentum", [0.0, -0.5])
@pytest.mark.parametrize("longest", [0.0, 15.0])
@pytest.mark.parametrize("parallel", [0.0, 0.3, 1.0])
def test_adaptive_projected_guidance(parallel, longest, momentum, rescale):
    guider = diffusers.AdaptiveProjectedGuidance(
        6.0,
        adaptive_projected_guidance_momentum=momentum or None,
        adaptive_projected_guidance_rescale=longest,
        eta=parallel,
        guidance_rescale=rescale,
    )
    ours = AdaptiveProjectedGuidance(6.0, rescale, parallel=parallel, longest=longest, momentum=momentum)
    assert way(ours, guider) == 0


@pytest.mark.parametrize("rescale", [0.0, 0.6])
def test_tangential_guidance(rescale):
    assert way(TangentialGuidance(6.0, rescale), diffusers.TangentialClassifierFreeGuidance(6.0, guidance_rescale=rescale)) == 0


@pytest.mark.parametrize("still", [0, 2])
def test_zero_star_guidance(still):
    assert way(ZeroStarGuidance(6.0, still=still), diffusers.ClassifierFreeZeroStarGuidance(6.0, zero_init_steps=still)) == 0


def test_zero_star_guidance_rescaled():
    guider = diffusers.ClassifierFreeZeroStarGuidance(6.0, zero_init_steps=0, guidance_rescale=0.6)
    assert way(ZeroStarGuidance(6.0, 0.6, still=0), guider) == 0


def test_standing_still_and_rescaled_is_no_nan():
    # The peer divides zeros by their deviation there.
    step = Step(torch.ones(1, 4, 8, 8), STEPS)
    assert not ZeroStarGuidance(6.0, 0.6)(Spoken({}), step).any()


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.3, 0.9)])
def test_intervals(start, stop):
    ours = GuidanceInterval(ClassifierFreeGuidance(6.0), start, stop)
    assert (
        way(ours, diffusers.ClassifierFreeGuidance(6.0, start=start, stop=stop)) < 1e-4
    )  # a sum in another order, of large numbers
    assert (
        way(
            GuidanceInterval(TangentialGuidance(6.0), start, stop),
            diffusers.TangentialClassifierFreeGuidance(6.0, start=start, stop=stop),
        )
        == 0
    )


@pytest.mark.parametrize("interval", [(-0.1, 1.0), (0.6, 0.5), (0.0, 1.1)])
def test_intervals_that_are_none_are_refused(interval):
    with pytest.raises(InputError, match="no interval of guidance"):
        GuidanceInterval(ClassifierFreeGuidance(6.0), *interval)


def test_an_interval_has_the_scale_of_what_it_holds():
    guidance = GuidanceInterval(ClassifierFreeGuidance(6.0), 0.2)
    guidance.scale += 1
    assert (guidance.guidance.scale, guidance.scale, guidance.branches) == (7.0, 7.0, ("uncond", "cond"))


# ---------------------------------------------------------------- worse models


@pytest.fixture
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@pytest.mark.parametrize("name", ["mid_block", "down_blocks.1", "up_blocks.0.attentions.1"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_attention_that_does_not_look_around(quiet_peer, name, scale):
    # The peer asks for three branches at once; here the worse one is asked for by itself, which rounds differently.
    peer = diffusers.StableDiffusionPAGPipeline.from_pretrained(folder("text"), pag_applied_layers=[name])
    peer.set_progress_bar_config(disable=True)
    pipes = peer, pair("text")[1]
    set_scheduler(pipes, "DDIMScheduler")
    expected = call(peer, "text", guidance_scale=scale, pag_scale=3.0)
    made = call(pipes[1], "text", guidance=WorseGuidance(scale, worse_scale=3.0, worsening=Unattended([name])))
    assert difference(made, expected) < 1e-5
    assert difference(made, call(pipes[1], "text", guidance_scale=scale)) > 0.01


@pytest.mark.parametrize("names", [["mid_block"], ["down_blocks.1", "up_blocks.0.attentions.0"]])
def test_blocks_that_are_skipped_do_nothing(quiet_peer, names):
    pipe = pair("xl text")[1]
    unet, inputs = pipe.unet, (torch.randn(1, 4, 8, 8), torch.tensor(10), torch.randn(1, 77, 64))
    added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.zeros(1, 6)}
    peer = copy.deepcopy(pair("xl text")[0].unet)
    for name in names:
        for path, module in peer.named_modules():
            if path.endswith(".transformer_blocks") and f"{path}.".startswith(f"{name}."):
                diffusers.hooks.apply_layer_skip(peer, LayerSkipConfig(list(range(len(module))), fqn=path))
    options = {"added_cond_kwargs": added}
    with torch.no_grad():
        ours = unet(*inputs, **options, cross_attention_kwargs=dict(Skipped(names)(unet)))[0]
        assert difference(ours, peer(*inputs, **options)[0]) == 0
        assert difference(ours, unet(*inputs, **options)[0]) > 1e-3


@pytest.mark.parametrize("scale", [6.0, 1.0])
def test_away_from_what_is_worse(scale):
    guider = diffusers.SkipLayerGuidance(
        scale, 2.8, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0, skip_layer_guidance_layers=[0]
    )
    cond, uncond, worse = (torch.randn(2, 4, 8, 8) for _ in range(3))
    guider.set_state(1, STEPS, torch.tensor(0))
    told = {"pred_cond": cond, "pred_cond_skip": worse} | ({"pred_uncond": uncond} if scale > 1 else {})
    guided = uncond + scale * (cond - uncond) if scale > 1 else worse
    expected = guider.forward(**told).pred
    assert difference(expected, guided + 2.8 * (cond - worse)) < 1e-5


def test_layers_that_are_not_there_are_told():
    pipe = pair("text")[1]
    with pytest.raises(InputError, match=r"no transformer block is below 'middle'(.|\n)*mid_block.attentions.0"):
        call(pipe, "text", guidance=WorseGuidance(5.0, worsening=Unattended(["middle"])), **QUICK)


def test_guided_by_a_worse_model():
    pipe = pair("text")[1]
    worse = suffuse.StableDiffusionPipeline.from_pretrained(folder("text")).unet
    with torch.no_grad():
        worse.conv_out.weight.mul_(0.5)
    guidance = AutoGuidance(2.0, worse)
    assert guidance.fork().worse is worse
    made = call(pipe, "text", guidance=guidance, **QUICK)
    plain = call(pipe, "text", guidance_scale=1.0, **QUICK)
    assert difference(made, plain) > 0.01
    assert difference(call(pipe, "text", guidance=AutoGuidance(1.0, worse), **QUICK), plain) < 1e-4


# ---------------------------------------------------------------- in pipelines


VALUES = {
    "projected": AdaptiveProjectedGuidance(6.0, parallel=0.0, longest=15.0, momentum=-0.5),
    "tangential": TangentialGuidance(6.0),
    "zero star": ZeroStarGuidance(6.0),
    "interval": GuidanceInterval(ClassifierFreeGuidance(6.0), 0.4, 0.8),
    "unattended": WorseGuidance(6.0),
    "skipped": GuidanceInterval(WorseGuidance(6.0, worsening=Skipped(["up_blocks.0"])), 0.0, 0.5),
    "self-attention": SelfAttentionGuidance(6.0, sag_scale=0.9),
    "semantic": SemanticGuidance(6.0, [Concept("a hat", warmup=0), Concept("snow", warmup=1, reverse=True)]),
    "safe": SafeGuidance(6.0, "harm", warmup=1),
    "semantic, in part": GuidanceInterval(SemanticGuidance(6.0, [Concept(["a hat"], warmup=0)]), 0.0, 0.7),
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("task", ["text", "image", "inpaint", "xl text", "control text"])
def test_every_pipeline_takes_every_value_and_keeps_none(task, value):
    pipe = pair(task)[1]
    set_scheduler(pair(task), "DDIMScheduler")  # tests share these pipelines, and leave other schedulers
    first, plain, second = (
        call(pipe, task, **told, **QUICK)
        for told in ({"guidance": VALUES[value]}, {"guidance_scale": 6.0}, {"guidance": VALUES[value]})
    )
    assert difference(first, second) == 0
    assert difference(first, plain) > 1e-4


EDITS = {"editing_prompt": ["a hat", "snow"], "edit_warmup_steps": [0, 1], "reverse_editing_direction": [False, True]}
OWN_CLASS = {
    "self-attention": (suffuse.StableDiffusionSAGPipeline, {"sag_scale": 0.9}),
    "semantic": (suffuse.SemanticStableDiffusionPipeline, EDITS),
    "safe": (suffuse.StableDiffusionPipelineSafe, {"sld_warmup_steps": 1, "safety_concept": "harm"}),
}


@pytest.mark.parametrize("prompt", ["a cat", ["a cat", "a dog"]], ids=["one", "two"])
@pytest.mark.parametrize("value", OWN_CLASS)
def test_a_value_guides_as_the_class_that_has_it(value, prompt):
    (own, options), pipe = OWN_CLASS[value], pair("text")[1]
    set_scheduler(pair("text"), "DDIMScheduler")
    made = call(pipe, "text", prompt=prompt, num_images_per_prompt=2, guidance=VALUES[value], **QUICK)
    by_class = call(own.from_pipe(pipe), "text", prompt=prompt, num_images_per_prompt=2, guidance_scale=6.0, **options, **QUICK)
    # Of two prompts, the class reads each concept twice, as the peer does: another batch, and other last bits.
    assert difference(made, by_class) <= (1e-5 if value == "semantic" and prompt != "a cat" else 0)


def test_branches_are_told_embeddings_too():
    pipe = pair("text")[1]
    set_scheduler(pair("text"), "DDIMScheduler")
    states = pipe.encode_prompt("a hat", torch.device("cpu"), 1, False)[0][0]
    by_text, by_states = (
        call(pipe, "text", guidance=SemanticGuidance(6.0, [Concept(told, warmup=0)]), **QUICK) for told in ("a hat", states)
    )
    assert difference(by_text, by_states) == 0


@pytest.mark.parametrize("task", ["text", "xl text"])
@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["a", "b", "c"], r"edit_0 is told 3 texts(.|\n)*one, or 1"),
        (torch.zeros(4, 5), r"edit_0 is told has the wrong shape(.|\n)*\(1, 4, 5\)"),
    ],
)
def test_texts_of_branches_that_fit_no_prompt_are_told(task, told, message):
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    with pytest.raises(InputError, match=message):
        pair(task)[1]("a cat", guidance=SemanticGuidance(6.0, [Concept(told)]), generator=generator)
    assert torch.equal(before, generator.get_state())


def test_an_embedding_says_too_little_to_stable_diffusion_xl():
    with pytest.raises(InputError, match="edit_0 is told an embedding, and this pipeline needs more"):
        pair("xl text")[1]("a cat", guidance=SemanticGuidance(6.0, [Concept(torch.zeros(77, 64))]))


def test_concepts_without_guidance_are_told():
    with pytest.raises(InputError, match=r"concepts are given, and scale=1\.0 guides nothing"):
        SemanticGuidance(1.0, [Concept("a hat")])


BEFORE_ANYTHING = {
    "timesteps between those of training": (
        SelfAttentionGuidance(6.0),
        "self-attention guidance does not work with EulerDiscreteScheduler",
    ),
    "no such layer": (SelfAttentionGuidance(6.0, layer="nowhere"), "no transformer block is below 'nowhere'"),
    "no such part": (GuidanceInterval(WorseGuidance(6.0, worsening=Skipped(["x"]))), "no transformer block is below 'x'"),
}


@pytest.mark.parametrize("name", BEFORE_ANYTHING)
def test_guidance_that_does_not_fit_spends_nothing(name):
    guidance, message = BEFORE_ANYTHING[name]
    pipe, generator = pair("text")[1], torch.Generator().manual_seed(1)
    set_scheduler(pair("text"), "EulerDiscreteScheduler")
    before = generator.get_state()
    with pytest.raises(InputError, match=message):
        pipe("a cat", guidance=guidance, generator=generator)
    assert torch.equal(before, generator.get_state())


@dataclass
class Backwards(ClassifierFreeGuidance):
    """The same, with its branches the other way round."""

    @property
    def branches(self) -> tuple[str, ...]:
        return super().branches[::-1]


@pytest.mark.parametrize("task", ["text", "inpaint", "xl text", "control text"])
def test_branches_are_told_by_name(task):
    # In another order, a batch has other last bits.
    pipe = pair(task)[1]
    set_scheduler(pair(task), "DDIMScheduler")
    there, back = (call(pipe, task, guidance=kind(6.0), **QUICK) for kind in (ClassifierFreeGuidance, Backwards))
    assert difference(there, back) < 1e-4


# ---------------------------------------------------------------- values that cannot be made

NAN = float("nan")
MADE_WRONG = {
    "a text for a scale": (
        lambda: ClassifierFreeGuidance("7"),
        r"ClassifierFreeGuidance.scale must be a number(.|\n)*'7' \(str\)",
    ),
    "nothing for a scale": (lambda: ClassifierFreeGuidance(None), "ClassifierFreeGuidance.scale must be a number"),
    "a tensor for a scale": (lambda: ClassifierFreeGuidance(torch.tensor(NAN)), r"scale must be a number(.|\n)*a tensor \(\)"),
    "no number": (lambda: SafeGuidance(NAN), "SafeGuidance.scale=nan is out of range"),
    "too much rescale": (lambda: TangentialGuidance(6.0, 2.0), r"TangentialGuidance.rescale=2.0 is out of range(.|\n)*\[0, 1\]"),
    "a yes for a number": (lambda: WorseGuidance(6.0, worse_scale=True), "WorseGuidance.worse_scale must be a number"),
    "no worse scale": (lambda: WorseGuidance(6.0, worse_scale=None), "WorseGuidance.worse_scale must be a number"),
    "a text for momentum": (lambda: AdaptiveProjectedGuidance(6.0, momentum="a"), "AdaptiveProjectedGuidance.momentum must be"),
    "shorter than nothing": (lambda: AdaptiveProjectedGuidance(6.0, longest=-1), r"longest=-1 is out of range(.|\n)*at least 0"),
    "still for less than no step": (lambda: ZeroStarGuidance(6.0, still=-1), "ZeroStarGuidance.still=-1 is out of range"),
    "still for no count": (lambda: ZeroStarGuidance(6.0, still="a"), "ZeroStarGuidance.still must be a whole number"),
    "a text for how far away": (
        lambda: SelfAttentionGuidance(6.0, sag_scale="a"),
        "SelfAttentionGuidance.sag_scale must be a number",
    ),
    "no name": (lambda: SelfAttentionGuidance(6.0, layer=None), "SelfAttentionGuidance.layer has the wrong type"),
    "nothing worse": (lambda: WorseGuidance(6.0, worsening=None), "WorseGuidance.worsening makes no model worse"),
    "a name for what is worse": (lambda: WorseGuidance(6.0, worsening="mid_block"), "worsening makes no model worse"),
    "a class for what is worse": (lambda: WorseGuidance(6.0, worsening=Unattended), "worsening makes no model worse"),
    "no layers": (lambda: Skipped([]), "Skipped.layers are no names"),
    "nothing for layers": (lambda: Skipped(None), "Skipped.layers has the wrong type"),
    "numbers of layers": (lambda: Unattended([3]), "Unattended.layers are no names"),
    "no worse model": (lambda: AutoGuidance(2.0, None), "AutoGuidance.worse has the wrong type"),
    "a concept of a number": (lambda: Concept(3), "Concept.prompt is no text"),
    "a concept of nothing": (lambda: Concept(None), "Concept.prompt is no text"),
    "a concept of no words": (lambda: Concept(""), "Concept.prompt is empty"),
    "a concept of no texts": (lambda: Concept([]), "Concept.prompt is an empty list"),
    "concepts in a tuple": (lambda: Concept(("a",)), "Concept.prompt is no text"),
    "concepts of numbers": (lambda: Concept([1]), r"Concept.prompt\[0\] is no text"),
    "half a character": (lambda: Concept("\ud800"), "Concept.prompt is no valid Unicode"),
    "an embedding of several": (
        lambda: Concept(torch.zeros(1, 77, 32)),
        r"Concept.prompt has the wrong shape(.|\n)*\(1, 77, 32\)",
    ),
    "an embedding of NaN": (lambda: Concept(torch.full((77, 32), NAN)), r"Concept.prompt has the wrong(.|\n)*not finite"),
    "a text for how far": (lambda: Concept("a hat", scale="5"), "Concept.scale must be a number"),
    "nobody knows how far": (lambda: Concept("a hat", scale=NAN), "Concept.scale=nan is out of range"),
    "a number for whether": (lambda: Concept("a hat", reverse=1), "Concept.reverse has the wrong type"),
    "before the first step": (lambda: Concept("a hat", warmup=-1), "Concept.warmup=-1 is out of range"),
    "between two steps": (lambda: Concept("a hat", warmup=0.2), "Concept.warmup must be a whole number"),
    "at no step": (lambda: Concept("a hat", cooldown="a"), "Concept.cooldown must be a whole number"),
    "more than everything": (lambda: Concept("a hat", threshold=2.0), "Concept.threshold=2.0 is out of range"),
    "of no known part": (lambda: Concept("a hat", threshold=NAN), "Concept.threshold=nan is out of range"),
    "a word for concepts": (lambda: SemanticGuidance(6.0, "dog"), "SemanticGuidance.concepts has the wrong type"),
    "words for concepts": (lambda: SemanticGuidance(6.0, ["dog"]), r"SemanticGuidance.concepts\[0\] has the wrong type"),
    "nothing to replay": (lambda: SemanticGuidance(6.0, replayed=[None]), r"replayed\[0\] has the wrong type"),
    "safe from nothing": (lambda: SafeGuidance(6.0, None), "SafeGuidance.concept is no text"),
    "safe from a number": (lambda: SafeGuidance(6.0, 3), "SafeGuidance.concept is no text"),
    "an interval of a class": (
        lambda: GuidanceInterval(ZeroStarGuidance),
        r"GuidanceInterval.guidance combines no(.|\n)*is made: ZeroStarGuidance",
    ),
    "an interval of nothing": (lambda: GuidanceInterval(None), "GuidanceInterval.guidance combines no predictions"),
    "from a text": (lambda: GuidanceInterval(ClassifierFreeGuidance(6.0), "a"), "GuidanceInterval.start must be a number"),
    "to nowhere": (lambda: GuidanceInterval(ClassifierFreeGuidance(6.0), 0.0, None), "GuidanceInterval.stop must be a number"),
}


@pytest.mark.parametrize("name", MADE_WRONG)
def test_values_that_cannot_be_are_not_made(name):
    make, message = MADE_WRONG[name]
    with pytest.raises(InputError, match=message):
        make()


def test_what_is_allowed_is_made():
    numbers = [ClassifierFreeGuidance(scale).scale for scale in (7, np.float32(7), np.int64(7))]
    assert numbers == [7, 7, 7]
    assert Concept(Weighted("(a hat:1.2)")).prompt == "(a hat:1.2)"
    assert Concept(["a hat", ""]).prompt[1] == ""  # nothing for the second picture


def test_one_name_is_one_layer():
    assert Unattended("mid_block") == Unattended(("mid_block",))


SET_LATER = {
    "rescale": (ClassifierFreeGuidance(6.0), "rescale", 2.0, r"guidance\.rescale=2\.0 is out of range"),
    "scale": (GuidanceInterval(ZeroStarGuidance(6.0)), "scale", "7", r"guidance\.guidance\.scale must be a number"),
    "held": (GuidanceInterval(ZeroStarGuidance(6.0)), "guidance", None, r"guidance\.guidance combines no predictions"),
    "concepts": (SemanticGuidance(6.0), "concepts", "dog", r"guidance\.concepts has the wrong type"),
}


@pytest.mark.parametrize("name", SET_LATER)
def test_values_that_were_spoiled_later_are_told_in_the_call(name):
    guidance, field, value, message = SET_LATER[name]
    guidance = copy.deepcopy(guidance)
    setattr(guidance, field, value)
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    with pytest.raises(InputError, match=message):
        pair("text")[1]("a cat", guidance=guidance, generator=generator)
    assert torch.equal(before, generator.get_state())


@pytest.mark.parametrize(
    ("replayed", "message"),
    [
        ([torch.zeros(2, 4, 8, 6)], "replayed: 1 edits for 4 steps"),
        (torch.zeros(4, 2, 4, 3, 3), r"replayed\[1\] has the wrong shape(.|\n)*\(2, 4, 3, 3\)(.|\n)*\(2, 4, 8, 6\)"),
    ],
)
def test_edits_that_do_not_fit_are_told_before_the_model_is_asked(replayed, message):
    def asked(step, branches):
        raise AssertionError("the model is asked")

    with pytest.raises(InputError, match=message):
        SemanticGuidance(6.0, replayed=replayed)(asked, Step(torch.zeros(2, 4, 8, 6), STEPS, 1))


class Scaleless(suffuse.Guidance):
    """A guidance of one's own that goes no further than the prompt."""

    branches = ("cond",)

    def __call__(self, denoiser, step):
        return denoiser(step, self.branches)["cond"]


@pytest.mark.parametrize("wrap", [lambda own: own, GuidanceInterval], ids=["itself", "in part"])
def test_a_guidance_of_ones_own_needs_no_scale(wrap):
    pipe, seen = pair("text")[1], []
    set_scheduler(pair("text"), "DDIMScheduler")

    def look(pipe, index, timestep, tensors):
        seen.append(pipe.guidance_scale)
        return tensors

    made = call(pipe, "text", guidance=wrap(Scaleless()), callback_on_step_end=look, **QUICK)
    assert difference(made, call(pipe, "text", guidance_scale=1.0, **QUICK)) == 0
    assert seen == [1.0] * 3
