"""Write pays.json from the rows of the three experiments."""
import json, statistics as st
from pathlib import Path
HERE=Path("/tmp/pays"); T={2:12.706,3:4.303,4:3.182,5:2.776,6:2.571,7:2.447,8:2.365,9:2.306}
def rows(n):
    p=HERE/n
    return [json.loads(l) for l in p.read_text().splitlines()[1:]] if p.exists() else []
def interval(d):
    if len(d)<2: return [round(d[0],2),None,None]
    m,h=st.mean(d),T[len(d)]*st.stdev(d)/len(d)**.5
    return [round(m,2),round(m-h,2),round(m+h,2)]
F={(r["recipe"],r["pairs"],r["seed"]):r["results"] for r in rows("features.jsonl")}
features={}
GROUPS={"k-NN and linear probes":lambda k:"backbone" in k and "name" not in k,"probes, embedding":lambda k:"embedding" in k and "name" not in k,"same concept by another designer":lambda k:"name" in k and "backbone" in k,
 "emoji":lambda k:k.startswith("emoji by cat") and "backbone" in k,"icons":lambda k:k.startswith("icons") and "backbone" in k,"stamps":lambda k:k.startswith("stamps") and "backbone" in k,
 "top-1":lambda k:k=="top-1, plain","top-1 corrupted":lambda k:k.startswith("top-1") and "plain" not in k}
for pairs in sorted({k[1] for k in F}):
    seeds=sorted({s for (r,p,s) in F if p==pairs and ("demo-clip",p,s) in F and ("demo-declip",p,s) in F})
    if not seeds: continue
    cell={"seeds":seeds}
    for name,test in GROUPS.items():
        keys=[k for k in F["demo-clip",pairs,seeds[0]] if test(k)]
        mean={r:[100*st.mean(F[r,pairs,s][k] for k in keys) for s in seeds] for r in ("demo-clip","demo-declip")}
        cell[name]={"clip":[round(x,2) for x in mean["demo-clip"]],"declip":[round(x,2) for x in mean["demo-declip"]],
          "difference":interval([b-a for a,b in zip(mean["demo-clip"],mean["demo-declip"])])}
    features[pairs]=cell
bare={}
for r in rows("bare.jsonl"):
    cell=bare.setdefault(str(r["pairs"]),{}).setdefault(r["arm"],{})
    for k in ("icons-validation top-1","icons-test top-1","icons-validation R@10","icons-test R@10"):
        cell.setdefault(k,[]).append(round(100*r[k],2))
out={"about":"95 % intervals are Student's t over seeds; values are percent","features":features,"bare_images":bare}
print(json.dumps(out,indent=1))
