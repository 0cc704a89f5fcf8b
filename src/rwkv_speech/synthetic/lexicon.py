"""Words of the small world in English, Spanish, French, Italian and Russian: one row a meaning, one column a language.

Forms of a word stand between slashes: of nouns the gender, singular and plural (Russian: gender, nominative,
accusative, and the forms after two to four and after five); of adjectives masculine and feminine (Russian: neuter and
the feminine accusative, too); of people what follows "call" beside the plain form (Russian: genitive and dative).
"""

from collections.abc import Mapping

from rwkv_speech.synthetic.phones import LANGUAGES

Word = dict[str, dict[str, str]]  # language -> name of a form -> the form

_VOWELS = "aeiouhéœô"
_ARTICLES = {
    "es": {"m": ("el ", "un "), "f": ("la ", "una ")},
    "fr": {"m": ("le ", "un "), "f": ("la ", "une ")},
    "it": {"m": ("il ", "un "), "f": ("la ", "una ")},
}

_Forms = Mapping[str, tuple[str, ...]]

_PLAIN: _Forms = dict.fromkeys(LANGUAGES, ("one",))
_NOUN: _Forms = {
    "en": ("one", "many"),
    **dict.fromkeys(("es", "fr", "it"), ("g", "one", "many")),
    "ru": ("g", "one", "acc", "few", "many"),
}
_ADJECTIVE: _Forms = {"en": ("m",), **dict.fromkeys(("es", "fr", "it"), ("m", "f")), "ru": ("m", "f", "n", "acc_f")}
_PERSON: _Forms = {"en": ("one",), "es": ("one", "to"), "fr": ("one",), "it": ("one",), "ru": ("one", "of", "to")}
_CITY: _Forms = {**_PLAIN, "ru": ("one", "in", "to")}


def _noun(lang: str, forms: dict[str, str]) -> dict[str, str]:
    one = forms["one"]
    if lang == "en":
        return {**forms, "g": "m", "the": f"the {one}", "a": f"a {one}"}
    if lang == "ru":
        return {**forms, "the": one, "a": one}
    the, a = _ARTICLES[lang][forms["g"]]
    if lang != "es" and one[0] in _VOWELS:
        the = "l'"
    return {**forms, "the": the + one, "a": a + one}


def _words(table: str, names: _Forms) -> list[Word]:
    """Rows of `table`; a column before the five languages is the gender in all of them."""
    words = []
    for row in table.strip().splitlines():
        cells = [cell.strip() for cell in row.split("|")]
        gender = {"g": cells.pop(0)} if len(cells) > len(LANGUAGES) else {}
        word = {}
        for lang, cell in zip(LANGUAGES, cells, strict=True):
            forms = {**gender, **dict(zip(names[lang], cell.split("/"), strict=False))}
            word[lang] = _noun(lang, forms) if names is _NOUN else forms
        words.append(word)
    return words


ANIMALS = _words(
    """
    dog/dogs | m/perro/perros | m/chien/chiens | m/cane/cani | f/собака/собаку/собаки/собак
    cat/cats | m/gato/gatos | m/chat/chats | m/gatto/gatti | f/кошка/кошку/кошки/кошек
    horse/horses | m/caballo/caballos | m/cheval/chevaux | m/cavallo/cavalli | f/лошадь/лошадь/лошади/лошадей
    bird/birds | m/pájaro/pájaros | m/oiseau/oiseaux | m/uccello/uccelli | f/птица/птицу/птицы/птиц
    cow/cows | f/vaca/vacas | f/vache/vaches | f/mucca/mucche | f/корова/корову/коровы/коров
    mouse/mice | m/ratón/ratones | f/souris/souris | m/topo/topi | f/мышь/мышь/мыши/мышей
    """,
    _NOUN,
)
THINGS = _words(
    """
    car/cars | m/coche/coches | f/voiture/voitures | f/macchina/macchine | f/машина/машину/машины/машин
    house/houses | f/casa/casas | f/maison/maisons | f/casa/case | m/дом/дом/дома/домов
    book/books | m/libro/libros | m/livre/livres | m/libro/libri | f/книга/книгу/книги/книг
    table/tables | f/mesa/mesas | f/table/tables | m/tavolo/tavoli | m/стол/стол/стола/столов
    chair/chairs | f/silla/sillas | f/chaise/chaises | f/sedia/sedie | m/стул/стул/стула/стульев
    lamp/lamps | f/lámpara/lámparas | f/lampe/lampes | f/lampada/lampade | f/лампа/лампу/лампы/ламп
    box/boxes | f/caja/cajas | f/boîte/boîtes | f/scatola/scatole | f/коробка/коробку/коробки/коробок
    bag/bags | f/bolsa/bolsas | m/sac/sacs | f/borsa/borse | f/сумка/сумку/сумки/сумок
    hat/hats | m/sombrero/sombreros | m/chapeau/chapeaux | m/cappello/cappelli | f/шляпа/шляпу/шляпы/шляп
    shirt/shirts | f/camisa/camisas | f/chemise/chemises | f/camicia/camicie | f/рубашка/рубашку/рубашки/рубашек
    key/keys | f/llave/llaves | f/clé/clés | f/chiave/chiavi | m/ключ/ключ/ключа/ключей
    letter/letters | f/carta/cartas | f/lettre/lettres | f/lettera/lettere | n/письмо/письмо/письма/писем
    picture/pictures | m/cuadro/cuadros | m/tableau/tableaux | m/quadro/quadri | f/картина/картину/картины/картин
    cup/cups | f/taza/tazas | f/tasse/tasses | f/tazza/tazze | f/чашка/чашку/чашки/чашек
    boat/boats | m/barco/barcos | m/bateau/bateaux | f/barca/barche | f/лодка/лодку/лодки/лодок
    flower/flowers | f/flor/flores | f/fleur/fleurs | m/fiore/fiori | m/цветок/цветок/цветка/цветков
    ball/balls | f/pelota/pelotas | m/ballon/ballons | f/palla/palle | m/мяч/мяч/мяча/мячей
    phone/phones | m/teléfono/teléfonos | m/téléphone/téléphones | m/telefono/telefoni | m/телефон/телефон/телефона/телефонов
    bed/beds | f/cama/camas | m/lit/lits | m/letto/letti | f/кровать/кровать/кровати/кроватей
    """,  # noqa: E501 (a row is a word)
    _NOUN,
)
COLOURS = _words(
    """
    red | rojo/roja | rouge/rouge | rosso/rossa | красный/красная/красное/красную
    blue | azul/azul | bleu/bleue | blu/blu | синий/синяя/синее/синюю
    green | verde/verde | vert/verte | verde/verde | зелёный/зелёная/зелёное/зелёную
    white | blanco/blanca | blanc/blanche | bianco/bianca | белый/белая/белое/белую
    black | negro/negra | noir/noire | nero/nera | чёрный/чёрная/чёрное/чёрную
    yellow | amarillo/amarilla | jaune/jaune | giallo/gialla | жёлтый/жёлтая/жёлтое/жёлтую
    grey | gris/gris | gris/grise | grigio/grigia | серый/серая/серое/серую
    brown | marrón/marrón | marron/marron | marrone/marrone | коричневый/коричневая/коричневое/коричневую
    """,
    _ADJECTIVE,
)
# Neighbours are opposites.
QUALITIES = _words(
    """
    big | grande/grande | grand/grande | grande/grande | большой/большая/большое
    small | pequeño/pequeña | petit/petite | piccolo/piccola | маленький/маленькая/маленькое
    new | nuevo/nueva | nouveau/nouvelle | nuovo/nuova | новый/новая/новое
    old | viejo/vieja | vieux/vieille | vecchio/vecchia | старый/старая/старое
    good | bueno/buena | bon/bonne | buono/buona | хороший/хорошая/хорошее
    bad | malo/mala | mauvais/mauvaise | cattivo/cattiva | плохой/плохая/плохое
    heavy | pesado/pesada | lourd/lourde | pesante/pesante | тяжёлый/тяжёлая/тяжёлое
    light | ligero/ligera | léger/légère | leggero/leggera | лёгкий/лёгкая/лёгкое
    clean | limpio/limpia | propre/propre | pulito/pulita | чистый/чистая/чистое
    dirty | sucio/sucia | sale/sale | sporco/sporca | грязный/грязная/грязное
    long | largo/larga | long/longue | lungo/lunga | длинный/длинная/длинное
    short | corto/corta | court/courte | corto/corta | короткий/короткая/короткое
    fast | rápido/rápida | rapide/rapide | veloce/veloce | быстрый/быстрая/быстрое
    slow | lento/lenta | lent/lente | lento/lenta | медленный/медленная/медленное
    """,
    _ADJECTIVE,
)
PRONOUNS = _words("it | él/ella | il/elle | lui/lei | он/она/оно", _ADJECTIVE)
FEELINGS = _words(
    """
    tired | cansado/cansada | fatigué/fatiguée | stanco/stanca | устал/устала
    happy | contento/contenta | content/contente | contento/contenta | доволен/довольна
    sick | enfermo/enferma | malade/malade | malato/malata | болен/больна
    busy | ocupado/ocupada | occupé/occupée | occupato/occupata | занят/занята
    alone | solo/sola | seul/seule | solo/sola | один/одна
    ready | listo/lista | prêt/prête | pronto/pronta | готов/готова
    free | libre/libre | libre/libre | libero/libera | свободен/свободна
    """,
    _ADJECTIVE,
)
PAST_VERBS = _words(
    """
    bought | compró | a acheté | ha comprato | купил/купила
    saw | vio | a vu | ha visto | увидел/увидела
    lost | perdió | a perdu | ha perso | потерял/потеряла
    found | encontró | a trouvé | ha trovato | нашёл/нашла
    sold | vendió | a vendu | ha venduto | продал/продала
    """,
    _ADJECTIVE,
)
PEOPLE = _words(
    """
    f | my mother | mi madre/a mi madre | ma mère | mia madre | моя мама/моей мамы/моей маме
    m | my father | mi padre/a mi padre | mon père | mio padre | мой папа/моего папы/моему папе
    f | my sister | mi hermana/a mi hermana | ma sœur | mia sorella | моя сестра/моей сестры/моей сестре
    m | my brother | mi hermano/a mi hermano | mon frère | mio fratello | мой брат/моего брата/моему брату
    f | my aunt | mi tía/a mi tía | ma tante | mia zia | моя тётя/моей тёти/моей тёте
    m | my uncle | mi tío/a mi tío | mon oncle | mio zio | мой дядя/моего дяди/моему дяде
    m | my friend | mi amigo/a mi amigo | mon ami | il mio amico | мой друг/моего друга/моему другу
    m | the teacher | el profesor/al profesor | le professeur | il professore | учитель/учителя/учителю
    m | the doctor | el médico/al médico | le médecin | il medico | врач/врача/врачу
    f | the neighbour | la vecina/a la vecina | la voisine | la vicina | соседка/соседки/соседке
    """,
    _PERSON,
)
ROOMS = _words(
    """
    in the kitchen | en la cocina | dans la cuisine | in cucina | на кухне
    in the garden | en el jardín | dans le jardin | in giardino | в саду
    in the bathroom | en el baño | dans la salle de bain | in bagno | в ванной
    in the bedroom | en el dormitorio | dans la chambre | in camera | в спальне
    in the garage | en el garaje | dans le garage | in garage | в гараже
    in the office | en la oficina | dans le bureau | in ufficio | в офисе
    """,
    _PLAIN,
)
PLACES = ROOMS + _words(
    """
    at school | en la escuela | à l'école | a scuola | в школе
    under the table | debajo de la mesa | sous la table | sotto il tavolo | под столом
    behind the door | detrás de la puerta | derrière la porte | dietro la porta | за дверью
    near the window | cerca de la ventana | près de la fenêtre | vicino alla finestra | у окна
    on the chair | sobre la silla | sur la chaise | sulla sedia | на стуле
    behind the tree | detrás del árbol | derrière l'arbre | dietro l'albero | за деревом
    """,
    _PLAIN,
)
DEVICES = _words(
    """
    the light | la luz | la lumière | la luce | свет
    the radio | la radio | la radio | la radio | радио
    the television | la televisión | la télévision | la televisione | телевизор
    the heating | la calefacción | le chauffage | il riscaldamento | отопление
    the music | la música | la musique | la musica | музыку
    the computer | el ordenador | l'ordinateur | il computer | компьютер
    """,
    _PLAIN,
)
SWITCHES = _words(
    "turn on | enciende | allume | accendi | включи\nturn off | apaga | éteins | spegni | выключи", _PLAIN
)
FOODS = _words(
    """
    bread | pan | du pain | pane | хлеб
    milk | leche | du lait | latte | молоко
    coffee | café | du café | caffè | кофе
    tea | té | du thé | tè | чай
    water | agua | de l'eau | acqua | воду
    cheese | queso | du fromage | formaggio | сыр
    rice | arroz | du riz | riso | рис
    fish | pescado | du poisson | pesce | рыбу
    meat | carne | de la viande | carne | мясо
    soup | sopa | de la soupe | zuppa | суп
    fruit | fruta | des fruits | frutta | фрукты
    sugar | azúcar | du sucre | zucchero | сахар
    """,
    _PLAIN,
)
FOOD_VERBS = _words("wants | quiere | veut | vuole | хочет\nbuys | compra | achète | compra | покупает", _PLAIN)
MEALS = _words(
    """
    for breakfast | para el desayuno | pour le petit déjeuner | per colazione | на завтрак
    for lunch | para el almuerzo | pour le déjeuner | per pranzo | на обед
    for dinner | para la cena | pour le dîner | per cena | на ужин
    """,
    _PLAIN,
)
CITIES = _words(
    """
    madrid | madrid | madrid | madrid | мадрид/мадриде/мадрид
    paris | parís | paris | parigi | париж/париже/париж
    rome | roma | rome | roma | рим/риме/рим
    london | londres | londres | londra | лондон/лондоне/лондон
    berlin | berlín | berlin | berlino | берлин/берлине/берлин
    moscow | moscú | moscou | mosca | москва/москве/москву
    lisbon | lisboa | lisbonne | lisbona | лиссабон/лиссабоне/лиссабон
    vienna | viena | vienne | vienna | вена/вене/вену
    """,
    _CITY,
)
VEHICLES = _words(
    """
    by train | en tren | en train | in treno | на поезде
    by bus | en autobús | en bus | in autobus | на автобусе
    by car | en coche | en voiture | in macchina | на машине
    by bicycle | en bicicleta | à vélo | in bicicletta | на велосипеде
    by taxi | en taxi | en taxi | in taxi | на такси
    """,
    _PLAIN,
)
WEATHER = _words(
    """
    it is cold | hace frío | il fait froid | fa freddo | холодно
    it is hot | hace calor | il fait chaud | fa caldo | жарко
    it is raining | llueve | il pleut | piove | идёт дождь
    it is snowing | nieva | il neige | nevica | идёт снег
    it is windy | hace viento | il y a du vent | c'è vento | дует ветер
    it is sunny | hace sol | il y a du soleil | c'è il sole | светит солнце
    """,
    _PLAIN,
)
DAYS = _words(
    """
    on monday | el lunes | lundi | lunedì | в понедельник
    on tuesday | el martes | mardi | martedì | во вторник
    on wednesday | el miércoles | mercredi | mercoledì | в среду
    on thursday | el jueves | jeudi | giovedì | в четверг
    on friday | el viernes | vendredi | venerdì | в пятницу
    on saturday | el sábado | samedi | sabato | в субботу
    on sunday | el domingo | dimanche | domenica | в воскресенье
    """,
    _PLAIN,
)
THIS_MORNING = _words("this morning | esta mañana | ce matin | stamattina | сегодня утром", _PLAIN)
PRESENT = THIS_MORNING + _words(
    "today | hoy | aujourd'hui | oggi | сегодня\nnow | ahora | maintenant | adesso | сейчас", _PLAIN
)
PAST = THIS_MORNING + _words("yesterday | ayer | hier | ieri | вчера", _PLAIN)
# The index is the number.
NUMBERS = _words(
    """
    zero | cero | zéro | zero | ноль
    one | uno | un | uno | один
    two | dos | deux | due | два/две
    three | tres | trois | tre | три
    four | cuatro | quatre | quattro | четыре
    five | cinco | cinq | cinque | пять
    six | seis | six | sei | шесть
    seven | siete | sept | sette | семь
    eight | ocho | huit | otto | восемь
    nine | nueve | neuf | nove | девять
    ten | diez | dix | dieci | десять
    eleven | once | onze | undici | одиннадцать
    twelve | doce | douze | dodici | двенадцать
    """,
    _ADJECTIVE,
)
HOURS = _words(
    """
    at two | a las dos | à deux heures | alle due | в два часа
    at three | a las tres | à trois heures | alle tre | в три часа
    at four | a las cuatro | à quatre heures | alle quattro | в четыре часа
    at five | a las cinco | à cinq heures | alle cinque | в пять часов
    at six | a las seis | à six heures | alle sei | в шесть часов
    at seven | a las siete | à sept heures | alle sette | в семь часов
    at eight | a las ocho | à huit heures | alle otto | в восемь часов
    at nine | a las nueve | à neuf heures | alle nove | в девять часов
    """,
    _PLAIN,
)
NAMES = [
    {lang: {"one": name} for lang in LANGUAGES} for name in "max anna leo bella luna rex sam nina tom oscar".split()
]
