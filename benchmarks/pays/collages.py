import torch, sys
torch.set_num_threads(1)
import declip, numpy as np
from PIL import Image
import torch.nn.functional as F
from collections import defaultdict
from declip.data.builtin import open_builtin
from declip.data.images.preprocess import Preprocess
m=declip.load("builtin:lite2-minilm"); src=open_builtin("stamps-photos"); p=m.preprocessor
rng=np.random.default_rng(1); hit=defaultdict(list)
prep=Preprocess(384,p.mean.tolist(),p.std.tolist(),squash=True)
with torch.no_grad():
    for s in range(25):
        pick=rng.choice(len(src),4,replace=False)
        canvas=Image.new("RGB",(256,256),"white")
        for k,i in enumerate(pick): canvas.paste(src.image(int(i)).resize((128,128)),((k%2)*128,(k//2)*128))
        ink=(np.asarray(canvas).min(-1)<235)
        t=m.encode_text(m.tokenize([src.captions(int(i))[-1] for i in pick]))
        c=m.image_tower.encode_cells(prep([canvas]))[0]; g=int(len(c)**.5)
        n=c.norm(dim=-1,keepdim=True)
        for kind,cells in (("cos",c/n),("dot",c),("soft",c/(n+n.mean())),("sqrt",c/n.sqrt())):
            up=F.interpolate((cells@t.T).T.view(1,4,g,g),(256,256),mode="bilinear",align_corners=False)[0]
            for k in range(4):
                y,x=divmod(int(up[k].argmax()),256)
                q=(y//128)*2+x//128==k
                hit[kind,"quadrant"].append(q); hit[kind,"object"].append(q and bool(ink[y,x])); hit[kind,"ink"].append(bool(ink[y,x]))
                top=(up[k]>up[k].flatten().quantile(.9)).numpy(); hit[kind,"top10% on ink"].append(ink[top].mean())
    print("ink",ink.mean())
for k,v in hit.items(): print(k, round(float(np.mean(v)),3))
