from test_fsdp import *
@pytest.mark.parametrize("where", ["local", "s3"])
def test_sharded(gloo, tmp_path, where, bucket):
    path = tmp_path if where == "local" else bucket
    a, ma = fit(path, 2, "ddp")
    b, mb = fit(path, 2, "full", strategy=ModelParallelStrategy(), checkpoint_every_n_steps=3)
    f = RunFolder(str(path), "full")
    import pyarrow.fs
    for i in f.fs.get_file_info(pyarrow.fs.FileSelector(f.path, recursive=True)): print(i.path)
    print(f.checkpoints()); print(f.read(f.checkpoints()[0]+"/checkpoint.ckpt.sha256").decode())
    for (k, v), w in zip(ma.state_dict().items(), mb.state_dict().values()):
        print(k, (v - w).abs().max())
    for n, s in ((2, ModelParallelStrategy()), (3, ModelParallelStrategy()), (2, None), (0, None)):
        t = Trainer(num_workers=n, storage_path=str(path), **({"strategy": s} if s else {}))
        print(n, s, t.test(Net(), loader(shuffle=False), ckpt_path=f.location(f.checkpoints()[0])))
        print(n, s, t.predict(Net(), loader(32, shuffle=False), ckpt_path=f.location(f.checkpoints()[0]))[0][:2])
    for n, s in ((2, ModelParallelStrategy()), (3, ModelParallelStrategy()), (2, ModelParallelStrategy(save_distributed_checkpoint=False)), (2, None), (0, None)):
        t, m = fit(path, n, "full", strategy=s or "auto", max_epochs = t.current_epoch + 1 if t.current_epoch > 1 else 3, resume=True)
        print(n, s, [(r["train_loss"], r["val_loss"]) for r in read_metrics(RunFolder(str(path), "full"))][-1])
    a, ma = fit(path, 2, "ddp", resume=True, max_epochs=7)
    print("ddp", [(r["train_loss"], r["val_loss"]) for r in read_metrics(RunFolder(str(path), "ddp"))][2:])
    assert 0
