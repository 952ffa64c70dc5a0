"""What a model that answers with text alone cannot do, by the words with which it is asked for; by language.

As in Self-Instruct (Wang et al. 2022, arXiv:2212.10560), whose list is English. A phrase is found where its words stand
one after the other, in any case: "Map" in "map it", not in "mapping".
"""

from __future__ import annotations

from collections.abc import Iterable

from mlxtune.evaluate.checks.words import words_of

# ISO 639-1 code -> phrases, parted by commas.
BLACKLIST = {
    "en": "image, images, graph, graphs, picture, pictures, file, files, map, maps, draw, plot, go to, video",
    "de": "bild, bilder, diagramm, diagramme, foto, fotos, datei, dateien, landkarte, karte von, stadtplan, zeichne,"
    " zeichnen, gehe zu, video",
    "fr": "image, images, graphique, graphiques, photo, photos, fichier, fichiers, carte géographique, carte"
    " routière, carte du monde, carte de france, carte de la ville, dessine, dessinez, dessiner,"
    " va sur, allez sur, vidéo",
    "es": "imagen, imágenes, gráfico, gráficos, gráfica, foto, fotos, archivo, archivos, mapa, mapas, dibuja, dibujar,"
    " ve a, vídeo, video",
    "it": "immagine, immagini, grafico, grafici, foto, file, mappa, mappe, disegna, disegnare, vai a, video",
    "pt": "imagem, imagens, gráfico, gráficos, foto, fotos, arquivo, arquivos, ficheiro, mapa, mapas, desenhe,"
    " desenhar, vá para, vídeo",
    "nl": "afbeelding, afbeeldingen, grafiek, grafieken, foto, bestand, bestanden, landkaart, kaart van, teken,"
    " tekenen, ga naar, video",
    "pl": "obraz, obrazy, wykres, wykresy, zdjęcie, zdjęcia, plik, pliki, mapa, mapę, narysuj, idź do, wideo",
    "ru": "изображение, изображения, картинка, картинку, график, фото, файл, файлы, карта мира, карту мира,"
    " карту города, карту страны, нарисуй, нарисуйте, перейди, видео",
    "uk": "зображення, картинка, картинку, графік, фото, файл, файли, карта світу, карту світу, карту міста,"
    " намалюй, намалюйте, перейди, відео",
    "zh": "图片, 图像, 图表, 照片, 文件, 地图, 画一, 绘制, 视频",
    "ja": "画像, グラフ, 写真, ファイル, 地図, 描いて, 動画",
    "ko": "이미지, 그래프, 사진, 파일, 지도, 그려줘, 동영상",
}
# How a request for a whole program begins: engines make too many of these.
PROGRAM = {
    "en": "write a program",
    "de": "schreibe ein programm, schreiben sie ein programm",
    "fr": "écris un programme, écrivez un programme",
    "es": "escribe un programa, escriba un programa",
    "it": "scrivi un programma",
    "pt": "escreva um programa, escreve um programa",
    "nl": "schrijf een programma",
    "pl": "napisz program",
    "ru": "напиши программу, напишите программу",
    "uk": "напиши програму, напишіть програму",
    "zh": "编写一个程序, 写一个程序",
    "ja": "プログラムを書いて",
    "ko": "프로그램을 작성",
}


JOINS_PARTICLES = ("ko",)


def _phrases(table: dict[str, str]) -> dict[str, list[list[str]]]:
    return {code: [words_of(phrase) for phrase in text.split(",")] for code, text in table.items()}


_BLACKLIST, _PROGRAM = _phrases(BLACKLIST), _phrases(PROGRAM)


def blacklisted(words: list[str], languages: Iterable[str]) -> str:
    """The first phrase of these languages that stands in a text; "" for none. words: of the text."""
    for code in sorted(languages):
        for phrase in _BLACKLIST.get(code, []):
            size = len(phrase)
            parts = (words[place : place + size] for place in range(len(words) - size + 1))
            if any(_is(part, phrase, code) for part in parts):
                return " ".join(phrase)
    return ""


def asks_for_program(words: list[str], languages: Iterable[str]) -> bool:
    """Whether a text begins so. words: of the text."""
    return any(_is(words[: len(phrase)], phrase, code) for code in languages for phrase in _PROGRAM.get(code, []))


def _is(part: list[str], phrase: list[str], code: str) -> bool:
    """Whether these words are the phrase; the last one with an ending where the language joins its particles to words:
    지도를 is 지도.
    """
    if code not in JOINS_PARTICLES:
        return part == phrase
    return len(part) == len(phrase) and part[:-1] == phrase[:-1] and part[-1].startswith(phrase[-1])
