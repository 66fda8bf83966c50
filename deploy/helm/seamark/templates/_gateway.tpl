{{/* What a gateway is told besides. */}}
{{- define "seamark.gatewayEnv" -}}
- {name: SEAMARK_GATEWAY_HOST, value: 0.0.0.0}
- {name: SEAMARK_GATEWAY_PORT, value: "8080"}
{{ include "seamark.authEnv" . }}
- {name: SEAMARK_ORIGINS, value: {{ join "," .Values.gateway.origins | quote }}}
- {name: SEAMARK_TRUSTED_PROXIES, value: {{ join "," .Values.gateway.trustedProxies | quote }}}
- {name: SEAMARK_HANDSHAKES_PER_MINUTE, value: {{ int .Values.gateway.handshakesPerMinute | quote }}}
- {name: SEAMARK_TENANT_STATE_PERCENT, value: {{ int .Values.gateway.tenantStatePercent | quote }}}
- {name: SEAMARK_TRACE_URL, value: {{ .Values.traces.url | quote }}}
{{- end }}

{{/* Whose tokens are believed. Empty is not set. */}}
{{- define "seamark.authEnv" -}}
{{- if .Values.auth.jwksUrl -}}
- {name: SEAMARK_JWKS_URL, value: {{ .Values.auth.jwksUrl | quote }}}
{{- else -}}
- {name: SEAMARK_JWT_SECRET_FILE, value: /etc/seamark/secrets/jwt-secret}
{{- end }}
- {name: SEAMARK_JWT_ISSUER, value: {{ .Values.auth.issuer | quote }}}
- {name: SEAMARK_JWT_AUDIENCE, value: {{ .Values.auth.audience | quote }}}
{{- end }}
