"""Where training workers meet: nothing listens beyond the loopback interface if they are on one node."""

import json
import multiprocessing
import time

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spo_ray.train.rendezvous import join, listen


def _worker(rank, folder):
    torch.set_num_threads(1)
    file = folder / "address"
    if rank == 0:
        file.with_suffix(".new").write_text(json.dumps(listen(one_node=True)))
        file.with_suffix(".new").rename(file)
    while not file.exists():
        time.sleep(0.01)
    address, port = json.loads(file.read_text())
    join(rank, 2, address, port, "gloo", 60)
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    listening = [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    (folder / f"{rank}.json").write_text(json.dumps([int(total), address, sorted(set(listening))]))
    dist.barrier()
    dist.destroy_process_group()


def test_workers_of_one_node_meet_on_the_loopback_interface(tmp_path):
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(_worker, (tmp_path,), nprocs=2, start_method="forkserver")
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found == [[3, "127.0.0.1", ["127.0.0.1"]]] * 2
