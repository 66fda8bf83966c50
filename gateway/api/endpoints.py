"""All endpoints: the API is what stands here, and `GET /openapi.json` describes it."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from gateway.api.acks import acknowledge
from gateway.api.callbacks import take_callback
from gateway.api.campaigns import (
    campaign_channels,
    campaign_page,
    campaign_progress,
    cancel_campaign,
    create_campaign,
    get_campaign,
    pause_campaign,
    resume_campaign,
    set_campaign_rate,
    try_campaign,
)
from gateway.api.controls import change_controls, show_controls
from gateway.api.dead_letters import drop_letters, get_letter, group_letters, list_letters, replay_letters
from gateway.api.events import publish_event, publish_events
from gateway.api.explain import explain_event
from gateway.api.inbox import inbox_page, mark_archived, mark_read
from gateway.api.now import broadcast
from gateway.api.preference_page import choose, preference_page
from gateway.api.preferences import (
    own_preferences,
    patch_own_preferences,
    patch_preferences_of_user,
    preferences_of_user,
)
from gateway.api.proof import trace_notification
from gateway.api.push_tokens import (
    own_tokens,
    register_own_token,
    register_token,
    remove_own_token,
    remove_token,
    tokens_of_user,
)
from gateway.api.sessions import end_session, end_sessions, list_sessions
from gateway.api.suppressions import lift, lift_many, list_suppressions, search_suppressions, suppress
from gateway.api.template_preview import preview_template
from gateway.api.templates import activate, get_template, list_templates, remove_template, replace_template
from gateway.api.tenant_defaults import get_defaults, remove_defaults, replace_defaults
from gateway.api.topics import add_members, delete_topic, get_topic, member_page, remove_members, topic_page
from gateway.api.transactions import cancel_transaction
from gateway.api.types import get_type, list_types, remove_type, replace_type
from gateway.api.unsubscribe import unsubscribe, unsubscribe_page
from gateway.api.users import delete_user, get_user, patch_user, put_user, user_page
from gateway.api.webhook_replay import replay_webhook
from gateway.api.webhooks import (
    get_webhook,
    list_webhooks,
    make_webhook,
    remove_webhook,
    replace_webhook,
    retire_webhook_secret,
    rotate_webhook_secret,
)
from gateway.carriers.poll import poll_records
from gateway.carriers.sse import follow_stream
from gateway.carriers.ws import follow_socket
from gateway.health import healthz, readyz
from gateway.http.endpoint import Call, Endpoint
from gateway.http.openapi import document


@Endpoint("GET", "/openapi.json")
async def openapi(call: Call[None, None, None]) -> Annotated[msgspec.Raw, dict[str, Any]]:
    """This document."""
    return _DOCUMENT


ENDPOINTS: Final[tuple[Endpoint, ...]] = (
    publish_event,
    publish_events,
    broadcast,
    cancel_transaction,
    list_letters,
    group_letters,
    get_letter,
    replay_letters,
    drop_letters,
    follow_socket,
    follow_stream,
    poll_records,
    acknowledge,
    inbox_page,
    mark_read,
    mark_archived,
    trace_notification,
    list_sessions,
    end_sessions,
    end_session,
    list_types,
    get_type,
    replace_type,
    remove_type,
    list_templates,
    get_template,
    replace_template,
    activate,
    remove_template,
    preview_template,
    suppress,
    list_suppressions,
    search_suppressions,
    lift_many,
    lift,
    unsubscribe_page,
    unsubscribe,
    preference_page,
    choose,
    take_callback,
    make_webhook,
    list_webhooks,
    get_webhook,
    replace_webhook,
    remove_webhook,
    rotate_webhook_secret,
    retire_webhook_secret,
    replay_webhook,
    get_defaults,
    replace_defaults,
    remove_defaults,
    user_page,
    get_user,
    put_user,
    patch_user,
    delete_user,
    own_tokens,
    register_own_token,
    remove_own_token,
    tokens_of_user,
    register_token,
    remove_token,
    topic_page,
    get_topic,
    delete_topic,
    member_page,
    add_members,
    remove_members,
    show_controls,
    change_controls,
    own_preferences,
    patch_own_preferences,
    preferences_of_user,
    patch_preferences_of_user,
    explain_event,
    create_campaign,
    try_campaign,
    campaign_page,
    get_campaign,
    campaign_progress,
    campaign_channels,
    pause_campaign,
    resume_campaign,
    cancel_campaign,
    set_campaign_rate,
    healthz,
    readyz,
    openapi,
)

_DOCUMENT: Final = msgspec.Raw(msgspec.json.encode(document(ENDPOINTS)))
