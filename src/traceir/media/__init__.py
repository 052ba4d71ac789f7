"""What files hold beside plain images: pages of documents, frames of videos, previews of raw photographs, and their metadata.

Each module needs a package of the extra `files`, which is imported when such a file is met.
"""
