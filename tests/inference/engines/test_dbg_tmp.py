import torch
from diffusers import StableDiffusionImg2ImgPipeline
from tests.inference.engines.making import *
from tests.inference.engines.test_denoise import of_diffusers, ours
def test_x(tiny_sd_folder):
    sampler = sampler_of(tiny_sd_folder)
    print("threads", torch.get_num_threads())
    with torch.no_grad():
        a,_=sampler._encode(picture()); b,_=sampler._encode(picture()); print("enc", torch.equal(a,b))
        for n in (4,5,6,10):
            for s in (.5,.7,.9,1.0):
                spec = Spec(n, 5.0, 64, 48, scheduler="deis", strength=s)
                t=[of_diffusers(StableDiffusionImg2ImgPipeline, sampler, spec, image=torch.cat([a]*2), strength=s) for _ in range(2)]
                o=[ours(sampler, spec, starts=[picture()]*2) for _ in range(2)]
                print(n,s, torch.equal(t[0],t[1]), torch.equal(o[0],o[1]), torch.equal(t[0],o[0]), (t[0]-o[0]).abs().max().item())
