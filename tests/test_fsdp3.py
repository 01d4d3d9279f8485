from test_fsdp import *
class D(Net):
    def on_fit_start(self):
        import faulthandler
        faulthandler.dump_traceback_later(35, file=open(f"/work/try/fsdp/tb{self.global_rank}","w"))
def test_s3(gloo, tmp_path, bucket):
    t = Trainer(num_workers=2, storage_path=bucket, name="x", logger=False, max_epochs=2, strategy=ModelParallelStrategy(), checkpoint_every_n_steps=3)
    t.fit(D(), loader(), loader(shuffle=False))
