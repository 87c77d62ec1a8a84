"""How stock nnU-Net finds our trainers and our planner by name.

nnU-Net looks for a class by importing the modules of its own tree one after the other and asking
each ``hasattr(module, name)``. ``register`` gives the first module it asks, for trainers and for
planners, a module-level ``__getattr__`` (PEP 562) that answers to our names and to no others: the
stock commands take ``-tr MedDINOv3Trainer`` and ``-pl MedDINOv3Planner``. Nothing of nnU-Net is
written to or replaced, and our own code is imported only when one of our names is asked for.

With ``MEDDINOV3_PREDICTOR=1``, and only then, nnU-Net's commands for prediction use our predictor.

Where one of nnU-Net's commands names one of ours, or a misspelt one, what it needs is checked as
soon as it imports its module, before torch; commands without our names are not touched.

A start-up file beside the package calls ``autoregister`` in every interpreter of the environment.
Therefore this module imports ``os`` and ``sys`` alone, which every interpreter has loaded by then.
"""

import os
import sys

OPT_OUT = "MEDDINOV3_AUTOREGISTER"
PREDICTOR = "MEDDINOV3_PREDICTOR"

_TRAINER_MODULE = "nnunetv2_meddinov3.trainers.meddinov3_trainers"
_TRAINER_HOST = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
_PLANNER_HOST = "nnunetv2.experiment_planning.experiment_planners.default_experiment_planner"

_BASELINE_MODULE = "nnunetv2_meddinov3.trainers.baseline_trainers"

TRAINERS = (
    dict.fromkeys(
        (
            "MedDINOv3Trainer",
            "DINOv3Trainer",
            "MedDINOv3Trainer_scratch",
            "MedDINOv3Trainer_singlescale",
            "MedDINOv3Trainer_singlescale_matched",
            "DINOv3Trainer_singlescale",
            "DINOv3Trainer_singlescale_matched",
            "MedDINOv3Trainer_frozen",
            "MedDINOv3Trainer_NoMirroring",
            "MedDINOv3Trainer_50epochs",
            "MedDINOv3Trainer_250epochs",
            "MedDINOv3Trainer_demo",
        ),
        _TRAINER_MODULE,
    )
    | dict.fromkeys(
        (
            "MedDINOv3Trainer_sam",
            "MedDINOv3Trainer_sam_x4",
            "UNetTrainer",
            "UNetTrainer_adamw",
            "SegFormerTrainer",
            "SegFormerTrainer_imagenet",
            "DinoUNetTrainer",
            "SegDINOTrainer",
        ),
        _BASELINE_MODULE,
    )
    | dict.fromkeys(
        ("MedDINOv3Trainer_v2", "MedDINOv3Trainer_v2_convs"),
        "nnunetv2_meddinov3.trainers.meddinov3_v2_trainer",
    )
    | {"MedDINOv3Trainer_gpuaug": "nnunetv2_meddinov3.trainers.meddinov3_gpuaug_trainer"}
)
"""Name of each trainer -> module that defines it."""

PLANNERS = {"MedDINOv3Planner": "nnunetv2_meddinov3.planning"}
"""Name of each planner -> module that defines it."""

_PREDICTION = "nnunetv2.inference.predict_from_raw_data"

# Modules of nnU-Net's commands: imported by a command, they tell that it starts.
_COMMANDS = (
    "nnunetv2.run.run_training",
    _PREDICTION,
    "nnunetv2.evaluation.find_best_configuration",
    "nnunetv2.model_sharing.entry_points",
    "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints",
)

_HOSTS = {_TRAINER_HOST: TRAINERS, _PLANNER_HOST: PLANNERS}

started_up = False
"""True where the start-up file of the environment ran ``autoregister`` in this interpreter."""


def autoregister():
    """Register our names unless the user opted out; this is what the start-up file calls."""
    global started_up
    started_up = True
    if not is_opted_out():
        register()


def is_opted_out() -> bool:
    """Return whether the user switched the start-up file off, by ``MEDDINOV3_AUTOREGISTER=0``."""
    return os.environ.get(OPT_OUT) == "0"


def register():
    """Make our names findable by nnU-Net in this process; safe to call twice, early or late."""
    if not is_registered():
        sys.meta_path.insert(0, _HostFinder())
    for host in _HOSTS:
        if host in sys.modules:
            _attach(sys.modules[host])
    if _PREDICTION in sys.modules and _wants_our_predictor():
        _use_our_predictor()


def is_registered() -> bool:
    """Return whether ``register`` was called in this process."""
    return any(isinstance(finder, _HostFinder) for finder in sys.meta_path)


def resolve(name: str) -> type:
    """Import one of our trainers or planners.

    Raises:
        AttributeError: The name is not ours.
        UserError: The name is ours and our package, or one it needs, cannot be imported. As it is
            not an ``AttributeError``, ``hasattr`` does not mistake it for "no such class".
    """
    module_name = TRAINERS.get(name) or PLANNERS.get(name)
    if module_name is None:
        raise AttributeError(f"nnunetv2_meddinov3 has no trainer or planner named {name!r}")
    import importlib

    if own := _own_command():  # a model folder of any name: only its checkpoint names the trainer
        from nnunetv2_meddinov3.readiness import check_command as check_readiness

        check_readiness(*own)
    try:  # the trainers import timm, so that a broken one is named before nnU-Net starts work
        return getattr(importlib.import_module(module_name), name)
    except Exception as error:
        from nnunetv2_meddinov3.errors import UserError

        raise UserError(f"{name} cannot be used: {explain_import_error(error)}") from error


def explain_import_error(error: BaseException) -> str:
    """Return a sentence for an import that failed: what is wrong, where, and what to do.

    Args:
        error: What the import raised; its causes are searched too, because libraries re-raise.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if any(_is_torchvision_mismatch(link) for link in chain):
        return (
            f"torch {_version('torch')} and torchvision {_version('torchvision')} do not match; "
            "install both together, in one command and from the same place: "
            "pip install --upgrade --force-reinstall torch torchvision"
        )
    first = chain[0]
    what = " ".join(str(first).split()) or "no message"
    return (
        f"an import failed with {type(first).__name__}: {what}{_place(first)}; "
        "reinstall nnunetv2-meddinov3 and what it needs (`meddinov3 doctor` shows what is wrong)"
    )


def _is_torchvision_mismatch(error: BaseException) -> bool:
    """Return whether compiled operators of torchvision did not load into this torch."""
    text = str(error)
    return "torchvision::" in text or ("torchvision" in text and "undefined symbol" in text)


def _version(distribution: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _place(error: BaseException) -> str:
    """Return where an import failed, as `` (FILE, line N)``; empty where the message says it."""
    place, trace = "", None if isinstance(error, SyntaxError) else error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "importlib" not in file:  # the import system itself is never the place
            place = f" ({file}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place


def _attach(module):
    """Give one of nnU-Net's modules the ``__getattr__`` that knows our names, once."""
    names = _HOSTS[module.__name__]
    earlier = getattr(module, "__getattr__", None)
    if getattr(earlier, "answers_for", None) is names:
        return

    def module_getattr(name):
        if name in names:
            return resolve(name)
        if earlier is not None:
            try:
                return earlier(name)
            except AttributeError:
                _refuse_misspelt(name, names, module)
                raise
        _refuse_misspelt(name, names, module)
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    module_getattr.answers_for = names  # type: ignore[attr-defined]
    module.__getattr__ = module_getattr


def _refuse_misspelt(name, names, module):
    """Raise UserError for a name that looks like ours and is nobody's."""
    if name.startswith("_"):
        return  # Python itself asks for many of these
    from nnunetv2_meddinov3.spelling import is_like, refuse_misspelt

    if is_like(name, names):
        refuse_misspelt(name, list(names), getattr(module, "__file__", None))


def check_command(command, arguments):
    """Refuse a command of nnU-Net with our names in it that could not end well.

    Args:
        command: Its name, such as ``nnUNetv2_train``.
        arguments: What follows it.

    Raises:
        UserError: With what to do.
    """
    from nnunetv2_meddinov3.stock_commands import check

    check(command, arguments, TRAINERS, PLANNERS)


def own_options():
    """Return what nnU-Net's command of this process was asked: option -> value; else nothing."""
    own = _own_command()
    if own is None:
        return {}
    from nnunetv2_meddinov3.stock_options import read_options

    options = read_options(*own)
    return {} if options is None else vars(options)


def _own_command():
    """Return this process's command and its arguments if it is one of nnU-Net's, else None.

    A worker that nnU-Net spawned imports the main script again; it has none.
    """
    if not getattr(sys, "argv", None):
        return None
    command = sys.argv[0].replace(os.sep, "/").rpartition("/")[2]
    command = command.removesuffix(".exe").removesuffix("-script.pyw")
    spawning = sys.modules.get("multiprocessing.process")
    if not command.startswith("nnUNetv2_") or (spawning and spawning.parent_process()):
        return None
    return command, sys.argv[1:]


def _wants_our_predictor():
    """Return whether the user asked for our predictor in nnU-Net's own commands.

    Raises:
        UserError: If the variable says neither yes nor no.
    """
    value = os.environ.get(PREDICTOR, "").strip()
    if value not in ("", "0", "1"):
        from nnunetv2_meddinov3.errors import UserError

        raise UserError(f"{PREDICTOR} must be 0 or 1, got {value!r}.")
    return value == "1"


def _use_our_predictor():
    from nnunetv2_meddinov3.prediction.predictor import use_in_stock_command

    use_in_stock_command()


class _HostFinder:
    """Let the other finders find nnU-Net's two modules, and attach to them after they ran."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname in _COMMANDS and (own := _own_command()):
            check_command(*own)
        if fullname not in _HOSTS and not (fullname == _PREDICTION and _wants_our_predictor()):
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _HostFinder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                self._attach_after_execution(spec)
                return spec
        return None

    @staticmethod
    def _attach_after_execution(spec):
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if module.__name__ in _HOSTS:  # some loaders (zip files) serve many modules
                _attach(module)
            elif module.__name__ == _PREDICTION:
                _use_our_predictor()

        spec.loader.exec_module = exec_module
