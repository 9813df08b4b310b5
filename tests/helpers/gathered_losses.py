"""One of several gloo processes: `torchrun gathered_losses.py CASE FOLDER` writes its loss and gradient norms."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from model.mplug_video import MPlugVideoForPreTraining, MPlugVideoForRetrieval
from model.tasks.pretraining import contrastive_loss
from model.tasks.retrieval import matching_loss
from tests.helpers.upstream import Recording, grad_norms

KINDS = {"pretrain_contrastive": MPlugVideoForPreTraining, "retrieval": MPlugVideoForRetrieval}


def main(case: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, recording = dist.get_rank(), Recording("two_ranks")
    model = KINDS[case].from_pretrained(folder, dtype=torch.float32).eval()
    ids, mask = (recording[f"in/{case}.rank{rank}.{name}"] for name in ("input_ids", "attention_mask"))
    images = recording[f"in/rank{rank}.image"]
    if case == "retrieval":
        features = model(images, ids, mask)
        loss = matching_loss(*features, recording[f"in/retrieval.rank{rank}.idx"], model.temperature)
        out = {"loss": loss}
    else:
        video = model.encode_video(images)
        wanted = mask[:, 1:]
        caption = model.token_losses(video.prefix, ids, wanted).sum() / wanted.sum()
        contrastive = contrastive_loss(*model.contrastive_features(video, ids, mask), model.temperature)
        loss, out = contrastive, {"loss_caption": caption, "loss_contrastive": contrastive}
    loss.backward()
    names = recording.facts[f"names.{case}.names"]
    out["grad_norms"] = grad_norms(model, names, folder)
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    out["mean_grad_norms"] = grad_norms(model, names, folder)
    save_file({name: value.detach() for name, value in out.items()}, folder / f"{case}.rank{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
