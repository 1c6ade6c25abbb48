"""Models to the Hub, with their card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.publishing.card import (
        CardFacts,  # What a card tells of a run
        card_figures,  # Read the figures that a card publishes
        card_table,  # Read the figures that the card's table shows
        figure_of_card,  # Write a figure as the card's table has it
        settings_to_show,  # Leave secrets and folders out of settings
        write_card,  # Write the model card, with measured facts only
    )
    from hf_objectives.publishing.hub import (
        check_base,  # Check that an adapter's base is a model that others can load
        files_to_push,  # List what of a run's folder is pushed
        push,  # Upload a finished run; a failure costs nothing but the upload
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
