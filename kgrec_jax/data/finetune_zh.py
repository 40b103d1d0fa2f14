"""A small Chinese news set in CLUE's format that the project makes itself, with a known best answer.

A sentence names its class only through its words: a subject, an event and a detail of the class, among words that all
classes share. In a share of the sentences one of the three words is another class's, so that single words mislead.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import uuid

import numpy as np

from kgrec_jax.errors import KgrecError

# class: (subjects, events, details)
_CLASSES = {
    "体育": (("主队", "门将", "教练组", "女排姑娘", "短跑名将", "青训球员"), ("赢下决赛", "打破纪录", "遗憾落败", "晋级八强", "完成转会", "夺得金牌"),
             ("加时赛", "主场看台", "联赛积分", "世锦赛", "点球大战", "接力项目")),
    "财经": (("央行", "上市公司", "基金经理", "交易所", "保险机构", "投资者"), ("下调利率", "发布财报", "抛售股票", "回购债券", "扩大融资", "上调评级"),
             ("季度利润", "股市指数", "汇率波动", "通货膨胀", "存款准备金", "分红方案")),
    "科技": (("研究团队", "芯片厂商", "程序员", "航天器", "人工智能实验室", "手机品牌"), ("发布新系统", "开源代码", "完成对接", "突破算力", "申请专利", "修复漏洞"),
             ("量子计算", "卫星信号", "操作系统", "神经网络", "充电电池", "机器人手臂")),
    "娱乐": (("导演", "女主角", "歌手", "综艺嘉宾", "编剧", "乐队"), ("举办演唱会", "官宣新片", "登上热搜", "杀青", "领取奖杯", "录制节目"),
             ("电影票房", "红毯造型", "电视剧集", "专辑销量", "粉丝见面会", "片尾曲")),
    "教育": (("班主任", "高三学生", "招生办", "大学校长", "辅导员", "乡村教师"), ("公布分数线", "布置作业", "开设课程", "评选奖学金", "组织考试", "修订教材"),
             ("高考志愿", "毕业论文", "课堂纪律", "寒假安排", "实验教室", "图书馆座位")),
    "汽车": (("新能源车企", "试车员", "经销商", "老司机", "卡车车队", "赛车工程师"), ("召回车辆", "下线新款", "测试刹车", "提高续航", "更换轮胎", "降价促销"),
             ("发动机油耗", "充电桩", "底盘调校", "后备箱空间", "自动驾驶", "方向盘手感")),
}
_FRAMES = ("{time}，{a}{b}，{c}成为焦点", "{a}在{time}{b}，外界关注{c}", "谈到{c}时，{a}表示已经{b}", "{time}有消息称{a}{b}，与{c}有关",
           "{c}引发讨论：{a}{b}", "记者获悉，{a}{b}，{c}的情况{time}公布")
_TIMES = ("昨天", "本周末", "上个月", "今年春天", "近日", "凌晨", "节日期间", "三天后")


def sentence(rng: np.random.Generator, name: str, mislead: float) -> str:
    """One sentence of a class; with probability `mislead` one of its three words is another class's."""
    sources = [name] * 3
    if rng.random() < mislead:
        others = [other for other in _CLASSES if other != name]
        sources[rng.integers(3)] = others[rng.integers(len(others))]
    a, b, c = (_CLASSES[source][i][rng.integers(6)] for i, source in enumerate(sources))
    return _FRAMES[rng.integers(len(_FRAMES))].format(time=_TIMES[rng.integers(len(_TIMES))], a=a, b=b, c=c)


def write_news(folder: pathlib.Path | str, *, train: int = 2400, dev: int = 480, mislead: float = 0.3,
               seed: int = 0) -> pathlib.Path:
    """Writes train.json, dev.json and labels.json (CLUE's layout of TNEWS) into a new folder, whole or not at all.

    The same arguments give the same files; no sentence of dev is in train. KgrecError where the folder exists.
    """
    folder = pathlib.Path(folder)
    if folder.exists():
        raise KgrecError(f"{folder}: found an existing file or folder, expected a new one; nothing is overwritten")
    rng, names, seen = np.random.default_rng([seed, 53]), list(_CLASSES), set()
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        for part, number in (("dev", dev), ("train", train)):
            lines: list[str] = []
            for row in range(number):
                text = sentence(rng, names[row % len(names)], mislead)
                while text in seen:
                    text = sentence(rng, names[row % len(names)], mislead)
                seen.add(text)
                lines.append(json.dumps({"label": str(100 + row % len(names)), "label_desc": names[row % len(names)],
                                         "sentence": text}, ensure_ascii=False))
            order = rng.permutation(number)
            (temporary / f"{part}.json").write_text("".join(lines[i] + "\n" for i in order), encoding="utf-8")
        labels = [json.dumps({"label": str(100 + i), "label_desc": name}, ensure_ascii=False)
                  for i, name in enumerate(names)]
        (temporary / "labels.json").write_text("\n".join(labels) + "\n", encoding="utf-8")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
