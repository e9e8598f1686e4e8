"""A map of documents: documents with similar words lie near each other, and clusters are named.

TF-IDF of words, truncated SVD (latent semantic analysis; Deerwester et al. 1990), k-means for the clusters,
t-SNE (van der Maaten and Hinton 2008) for the plane; all from scikit-learn, on one thread with a fixed seed,
so the same documents give the same map.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# N documents, W words, C clusters.

CHARACTERS = 20_000
"""Characters used of each document."""
WORDS = 20_000
DIMENSIONS = 50
MOST_CLUSTERS = 16
LABEL_TERMS = 4
FEWEST = 12
"""With fewer documents there is no map."""


@dataclass(frozen=True)
class DocumentMap:
    """Places and clusters of documents."""

    places: NDArray[np.float64]
    """Each document's place in the unit square [N, 2]."""
    cluster: NDArray[np.int64]
    """Each document's cluster [N]."""
    labels: list[str]
    """The words that distinguish each cluster [C]."""


def map_documents(texts: Sequence[str], seed: int) -> DocumentMap:
    """Clusters texts and lays them out; a single cluster if there is too little text."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from threadpoolctl import threadpool_limits

    count = len(texts)
    flat = DocumentMap(np.full((count, 2), 0.5), np.zeros(count, np.int64), ["all"])
    if count < FEWEST:
        return flat
    # A word that occurs in one document, or in half of them, says little about similarity.
    vectorizer = TfidfVectorizer(
        token_pattern=r"[^\W\d_]{2,}", min_df=2, max_df=0.5, max_features=WORDS, sublinear_tf=True
    )
    with threadpool_limits(1):
        try:
            weights_NW = vectorizer.fit_transform([text[:CHARACTERS] for text in texts])
        except ValueError:  # No word is left.
            return flat
        if weights_NW.shape[1] < 3:
            return flat
        return _laid_out(weights_NW, vectorizer.get_feature_names_out(), seed)


def _laid_out(weights_NW: NDArray[np.float64], words: NDArray[np.str_], seed: int) -> DocumentMap:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import normalize

    count = weights_NW.shape[0]
    dimensions = min(DIMENSIONS, count - 1, weights_NW.shape[1] - 1)
    reduced = normalize(TruncatedSVD(dimensions, random_state=seed).fit_transform(weights_NW))
    clusters = int(np.clip(round((count / 2) ** 0.5), 2, MOST_CLUSTERS))
    cluster = KMeans(clusters, n_init=4, random_state=seed).fit_predict(reduced).astype(np.int64)
    plane = TSNE(perplexity=min(30.0, (count - 1) / 3), init="random", random_state=seed)
    places = plane.fit_transform(reduced).astype(np.float64)
    places -= places.min(0)
    places /= np.maximum(places.max(0), 1e-9)
    # The largest cluster is number 0.
    order = np.argsort(-np.bincount(cluster, minlength=clusters), kind="stable")
    order = order[: np.unique(cluster).size]
    rank = np.zeros(clusters, np.int64)
    rank[order] = np.arange(order.size)
    mean_W = np.asarray(weights_NW.mean(axis=0)).ravel()
    labels = []
    for number in order:
        apart_W = np.asarray(weights_NW[cluster == number].mean(axis=0)).ravel() - mean_W
        best = np.argsort(-apart_W, kind="stable")[:LABEL_TERMS]
        labels.append(" ".join(words[n] for n in best if apart_W[n] > 0) or "mixed")
    return DocumentMap(places, rank[cluster], labels)
