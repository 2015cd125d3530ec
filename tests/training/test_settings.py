"""Settings as they are typed: what is refused, with what remedy, before data is loaded."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from tiny import ROOT, run_quietly, tiny_config
from tiny_runs import fewer_pairs

from multimax.training.command_line import complete_length, explain_bad_overrides
from multimax.training.config import read_config

IMAGES = ["experiment=deit_multimax"]
SOFTMAX = ["experiment=deit_softmax"]
ENTMAX = ["experiment=deit_softmax", "attention=entmax"]
IMAGENET = ["experiment=deit_softmax", "data=imagenet"]
TEXT = ["experiment=lm_softmax"]
PAIRS = ["experiment=mt_softmax"]


def read(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return read_config(compose("config", overrides=list(overrides)))


REFUSED = [
    (IMAGES, "model.class_token=no", "model.class_token='no' must be true or false"),
    (SOFTMAX, "attention.learned=no", "attention.learned='no' must be true or false"),
    (SOFTMAX, "attention.learned=off", "attention.learned='off' must be true or false"),
    (TEXT, "model.pre_norm=abc", "model.pre_norm='abc' must be true or false"),
    (IMAGES, "schedule.per_epoch=maybe", "schedule.per_epoch='maybe' must be true or false"),
    (IMAGES, "schedule.warmup_lr=-1", "schedule.warmup_lr=-1 must be a number >= 0"),
    (IMAGES, "schedule.min_lr=1e-2", "schedule.min_lr=0.01 is above optimizer.lr=0.001, the"),
    (TEXT, "optimizer.lr=1e-6", "schedule.min_lr=1e-05 is above optimizer.lr=1e-06, the largest"),
    (IMAGES, "schedule.warmup_lr=1", "schedule.warmup_lr=1.0 is above optimizer.lr=0.001, the"),
    (IMAGES, "+trainer.clip_nrom=1", "there is no setting trainer.clip_nrom; did you mean trainer"),
    (IMAGES, "optimizer.betas=[0.9,0.99,0.999]", "optimizer.betas=[0.9, 0.99, 0.999] must be a"),
    (IMAGES, "optimizer.betas=0.9", "optimizer.betas=0.9 must be a list of 2 numbers"),
    (IMAGES, "name=../../x", "name='../../x' must be text"),
    (IMAGES, "name=null", "name=null must be text"),
    (IMAGES, "tags=abc", "tags='abc' must be a list of texts"),
    (IMAGES, "output_dir=null", "output_dir=null must be text"),
    (IMAGES, "optimizer.eps=abc", "optimizer.eps='abc' must be a number > 0 or null"),
    (IMAGES, "optimizer.name=null", "optimizer.name=null must be text"),
    (IMAGES, "optimizer.name=adamx", "optimizer.name='adamx' cannot be built with these options"),
    (IMAGES, "optimizer.name=adan", "optimizer.name='adan' cannot be built with these options"),
    (IMAGES, "optimizer.name=adahessian", "optimizer.name='adahessian' needs second derivatives"),
    (IMAGES, "loss.mixup=nan", "loss.mixup=nan must be a finite number >= 0"),
    (IMAGES, "loss.mixup=null", "loss.mixup=null must be a number >= 0"),
    (IMAGES, "model.mlp_ratio=abc", "model.mlp_ratio='abc' must be a number"),
    (IMAGES, "model.dropout=null", "model.dropout=null must be a number in [0, 1)"),
    (IMAGES, "model.attention_dropout=null", "model.attention_dropout=null must be a number in"),
    (TEXT, "model.activation_dropout=null", "model.activation_dropout=null must be a number in"),
    (IMAGES, "model.architecture=null", "model.architecture=null must be text"),
    (IMAGES, "model.architecture=deit_smal_patch16_224", "model.architecture='deit_smal_patch16_2"),
    (TEXT, "model.adaptive_cutoffs=5", "model.adaptive_cutoffs=5 must be a list of whole numbers"),
    (IMAGENET, "data.root=2014", "data.root=2014 must be text"),
    (IMAGES, "data.random_erasing=abc", "data.random_erasing='abc' must be a number in [0, 1]"),
    (IMAGENET, "data.auto_augment=foo", "data.auto_augment='foo': Unknown AA policy foo; a policy"),
    (IMAGENET, "data.auto_augment=rand-q9", "data.auto_augment='rand-q9': Unknown RandAugment con"),
    (IMAGENET, "data.auto_augment=rand-m1.5", "data.auto_augment='rand-m1.5': invalid literal for"),
    (SOFTMAX, "attention.temperature=null", "attention.temperature=null must be a number"),
    (SOFTMAX, "attention.temperature=1e-40", "attention.temperature must be in [1e-30, 1e+30], g"),
    (SOFTMAX, "attention.temperature=-1", "attention.temperature must be a finite number > 0, g"),
    (ENTMAX, "attention.heads=3", "attention.heads=3 is not model.num_heads=4: use atten"),
    (SOFTMAX, "+attention.shared=true", "attention.shared needs learned scalars, of which SoftMax"),
    (SOFTMAX, "+attention.before_scale=true", "there is no setting attention.before_scale; there"),
    (IMAGES, "+output.before_scale=true", "there is no setting output.before_scale; there are: n"),
    (IMAGES, "+output.shared=true", "there is no setting output.shared; there are: name, order,"),
    (IMAGES, "+attention.score_scale=2", "there is no setting attention.score_scale; did you mean"),
    (
        PAIRS,
        "model.cross_attention={name: multimax, shared: true}",
        "model.cross_attention: normalizer 'multimax' has no option shared; it has: order, init, ",
    ),
    (
        PAIRS,
        "model.cross_attention={name: topk, k: 8, before_scale: true}",
        "model.cross_attention.before_scale is for multimax, not for topk",
    ),
    (["output=entmax", *TEXT], "+output.heads=4", "output.heads=4: an output layer has no heads"),
    (PAIRS, "model.cross_attention=topp", "model.cross_attention: unknown normalizer 'topp'"),
    (PAIRS, "model.cross_attention={k: 3}", "model.cross_attention={k: 3} must have a name, as in"),
    (
        PAIRS,
        "model.encoder_attention={name: entmax, learned: true, heads: 3}",
        "model.encoder_attention.heads=3 is not model.num_heads=4: use model.encoder_attention.hea",
    ),
    (IMAGES, "~trainer.clip_norm", "trainer.clip_norm is missing; it must be a number > 0 or null"),
    (PAIRS, "decoding.beam=0", "decoding.beam=0 must be a whole number in [1, 1000]"),
    (PAIRS, "decoding.beam=null", "decoding.beam=null must be a whole number in [1, 1000]"),
    (PAIRS, "decoding.length_penalty=nan", "decoding.length_penalty=nan must be a finite number"),
    (PAIRS, "decoding.length_penalty=1e30", "decoding.length_penalty=1e+30 must be a number in ["),
    (PAIRS, "decoding.max_len_a=inf", "decoding.max_len_a=inf must be a finite number in [0, 100]"),
    (PAIRS, "decoding.max_len_b=-1", "decoding.max_len_b=-1 must be a whole number in [1, 10000]"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("base", "override", "said"), REFUSED, ids=[r[1] for r in REFUSED])
def test_refused_with_its_name(base, override, said):
    with pytest.raises(ValueError, match=r"^") as caught:
        read(*base, override)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_remedies():
    for override, remedy in {
        "optimizer.name=adamx": "did you mean adamax?",
        "optimizer.name=adan": "try optimizer.betas=null for its own",
        "model.architecture=deit_smal_patch16_224": "deit_small_patch16_224",
        "output_dir=2014": "; a number is text in quotes, 'output_dir=\"2014\"'",
    }.items():
        with pytest.raises(ValueError, match=r"^") as caught:
            read(*IMAGES, override)
        assert remedy in str(caught.value)
    assert read(*IMAGES, 'output_dir="2014"').output_dir == "2014"


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        [*IMAGES, "optimizer.eps=null"],
        [*IMAGES, "optimizer.name=adan", "optimizer.betas=null"],
        [*IMAGES, "optimizer.name=sgd", "+optimizer.momentum=0.9"],
        [*IMAGENET, "data.auto_augment=null"],
        [*IMAGENET, "data.auto_augment=augmix-m5-w4-d2"],
        [*IMAGES, "data.valid_size=0"],
        [*ENTMAX, "attention.heads=4"],
        [*TEXT, "schedule.min_lr=0", "schedule.warmup_lr=0", "optimizer.lr=1e-9"],
        [*PAIRS, "model.cross_attention=topk"],
        [*PAIRS, "model.cross_attention={name: multimax, before_scale: true}"],
        [*SOFTMAX, "attention=temperature", "attention.shared=true"],
        [*ENTMAX, "attention.heads=4", "attention.shared=true"],
        [*IMAGES, "attention.shared=true", "attention.before_scale=true"],
    ],
)
def test_taken(overrides):
    read(*overrides)


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        (["trainer.updates=20"], ["trainer.epochs=null"]),
        (["trainer.updates=20,30", "-m"], ["trainer.epochs=null"]),
        (["++trainer.updates=20", "seed=1"], ["trainer.epochs=null"]),
        (["trainer.epochs=2"], ["trainer.updates=null"]),
        (["trainer.epochs=2", "trainer.updates=null"], []),
        (["trainer.epochs=2", "trainer.updates=2"], []),
        (["trainer.epochs=null"], []),
        (["seed=1"], []),
        (["updates=3"], []),
    ],
)
def test_one_length_is_enough(arguments, added):
    assert complete_length(arguments) == [*arguments, *added]


def test_the_length_of_the_command_line_wins():
    for base, override in ((IMAGES, "trainer.updates=20"), (TEXT, "trainer.epochs=200")):
        trainer = read(*complete_length([*base, override])).trainer
        assert [trainer.epochs, trainer.updates].count(None) == 1
        assert {20, 200} & {trainer.epochs, trainer.updates}


@pytest.mark.slow
def test_without_a_valid_split_the_last_weights_count(tmp_path):
    result = run_quietly(tiny_config(tmp_path, "data.valid_size=0"))
    assert list(result["metrics"]) == ["test"]
    assert result["best"] == {"metric": "valid/top1", "value": None, "update": 0}
    assert result["updates"] == 4
    assert not list(tmp_path.rglob("best.pt"))
    assert len(list(tmp_path.rglob("last.pt"))) == 1
    with pytest.raises(ValueError, match=r"data\.valid_size=0 leaves nothing .*report=last"):
        read(*IMAGES, "data.valid_size=0", "trainer.report=best")


def test_best_weights_need_a_valid_split(tmp_path, monkeypatch):
    """Also of a data set that has none for another reason."""
    monkeypatch.setattr("multimax.training.checks._check_best", lambda config: None)
    config = tiny_config(tmp_path, "data.valid_size=0", "trainer.report=best")
    with pytest.raises(ValueError, match=r"trainer\.report=best needs a split 'valid'"):
        run_quietly(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data=null", "data=null must be one of: fashion_mnist, fashion_mnist_subset, imagenet"),
        ("experiment=null", "experiment=null must be one of: deit_entmax15, deit_evsoftmax"),
        ("attention=5", "attention=5 must be one of: asentmax, entmax"),
        ("output={name: topk, k: 2}", "output cannot be replaced as a whole: choose output=NAME"),
        ("recipe=[0.9,0.99]", "recipe=[0.9,0.99] must be one of: the files in configs/recipe"),
        ("recipe=null", "recipe=null must be one of: the files in configs/recipe"),
        ("optimizer.momentum=0.9", "optimizer.momentum is not in the configuration files: to add"),
    ],
)
def test_command_lines_that_do_not_compose(override, said):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        assert str(explain_bad_overrides([override])).startswith(said)


def test_removing_a_section_is_refused():
    with pytest.raises((ValueError, HydraException), match="optimizer"):
        read(*IMAGES, "~optimizer")


@pytest.mark.slow
def test_weights_that_diverge_in_the_last_update_are_said(tmp_path):
    """The loss of the update is finite, that of the evaluation after it is not; at each try."""
    config = tiny_config(tmp_path, "optimizer.lr=1e30", "trainer.updates=1", "schedule.warmup=0",
                         "trainer.evaluate_every=1")  # fmt: skip
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"the valid loss is (nan|inf).*Lower opt"):
            run_quietly(config)


@pytest.mark.slow
def test_beams_are_compared_with_the_vocabulary_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("multimax.training.trainer.Trainer.fit", lambda self: pytest.fail("fit"))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        small = "data.vocabulary_size=260", "decoding.beam=300"
        places = f"data.cache={tmp_path}", f"output_dir={tmp_path}"
        config = compose("config", [*PAIRS, *small, *places])
    message = r"decoding\.beam=300 must be less than 2\d\d, the"
    with fewer_pairs(), pytest.raises(ValueError, match=message):
        run_quietly(config)
