"""Release of both packages: checks of the state, builds, checks of their contents, installations, the tag.

``make release`` runs all of it; nothing here uploads. Publication is the work of .github/workflows/release.yml.
"""
